"""The operator's signing key, as the controller and `check` judge its file."""

from pathlib import Path

import pytest

from imdsproxy.config.schema import Settings
from imdsproxy.controller.identity import plan_signer
from imdsproxy.controller.key_file import find_key_error
from imdsproxy.errors import ConfigInvalid
from imdsproxy.tools.checks.identity import check_signing_key
from support.check_subject import subject


def _identity(path: Path) -> dict[str, dict[str, object]]:
    # Without a change of account, as for an operator who is not root.
    return {"identity": {"key_file": str(path), "signer_user": None, "user": None}}


@pytest.mark.parametrize(
    ("content", "mode", "reason", "hint"),
    [
        ("x", 0o644, "every user of this host", "chmod"),
        ("x", 0o640, "its group can use it", "chmod 0600"),
        ("x", 0o600, "no private key in PEM", "openssl genpkey"),
        (None, 0, "cannot read", "create it"),
    ],
)
def test_check_says_what_the_signer_would_end_with(
    tmp_path: Path, content: str | None, mode: int, reason: str, hint: str
) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    (finding,) = check_signing_key(subject(_identity(path)))
    assert finding.exit_status == 78
    assert finding.text.startswith("identity.key_file: ")
    assert (reason in finding.text, hint in finding.hint) == (True, True)


def test_a_credential_is_judged_by_the_signer_alone_while_its_unit_is_down() -> None:
    path = Path("/run/credentials/imdsproxy-signer-of-no-host.service/key")
    assert find_key_error(Settings.model_validate(_identity(path)).identity) is None


def test_a_hub_s_signer_takes_no_key_of_the_operator(tmp_path: Path) -> None:
    settings = Settings.model_validate(_identity(tmp_path / "key.pem"))
    with pytest.raises(ConfigInvalid) as caught:
        plan_signer(settings, hub=True)
    assert "identity.key_file" in str(caught.value)
    assert plan_signer(settings, hub=False).key_file == str(tmp_path / "key.pem")
