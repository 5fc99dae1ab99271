from __future__ import annotations

import os
from pathlib import Path

import pytest

from imdsproxy.host.servers import open_unix_socket
from imdsproxy.serving.server import Handover, accept_handover, write_handover
from imdsproxy.serving.supervisor import Place


def test_what_is_handed_over_comes_back_once(tmp_path: Path) -> None:
    file = tmp_path / "documents.handover"
    listener = open_unix_socket(tmp_path / "x.sock", mode=0o600)
    status = (tmp_path / "x.sock").stat()
    place = Place(tmp_path / "x.sock", listener, (status.st_dev, status.st_ino))
    lock, alive = os.pipe()
    write_handover(file, Handover(lock, alive, (place,), (11, 12)))
    assert os.get_inheritable(lock)
    assert os.get_inheritable(alive)
    assert os.get_inheritable(listener.fileno())
    number = listener.detach()
    got = accept_handover(file)
    assert got is not None
    (found,) = got.places
    assert (got.lock, got.alive, got.workers) == (lock, alive, (11, 12))
    assert found.listener.fileno() == number
    assert found.is_ours()
    assert not any(map(os.get_inheritable, (lock, alive, number)))
    assert accept_handover(file) is None
    found.listener.close()
    os.close(lock)
    os.close(alive)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"pid": 1}'])
def test_what_was_not_left_for_this_process_is_nothing(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "documents.handover"
    if text is not None:
        file.write_text(text)
    assert accept_handover(file) is None


def test_a_place_is_ours_until_another_socket_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with open_unix_socket(path, mode=0o600) as listener:
        status = path.stat()
        place = Place(path, listener, (status.st_dev, status.st_ino))
        assert place.is_ours()
        with open_unix_socket(path, mode=0o600):
            assert not place.is_ours()
        path.unlink()
        assert not place.is_ours()
