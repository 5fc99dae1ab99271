"""The passwords that guests post, one file an instance, written once.

A guest encrypts its password with its ssh key and posts it (`/openstack/…/password`); the owner reads it. It is
posted once in an instance's life, so it is synced to the disk before the guest gets its answer.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from imdsproxy.core.model import InstanceId
from imdsproxy.host.files import remove_file, sync_directory, write_atomic
from imdsproxy.host.refusal import host_refused

_FILE_MODE: Final = 0o640
_PERMISSION_HINT: Final = "the document server's account must be able to write the directory"


class PasswordStore:
    """A directory of passwords; several processes may use it at once.

    Args:
        directory: Must exist, and be writable for this process to keep anything.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, instance_id: InstanceId) -> bytes | None:
        """The instance's password; `None` when it has posted none.

        Raises:
            HostRefused: It cannot be read.
            PrivilegeMissing: This process may not read it.
        """
        try:
            # The directory is the document server's: a link in it must not have the controller read another file.
            descriptor = os.open(
                self._path(instance_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            )
            with os.fdopen(descriptor, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            action = f"read the password of {instance_id}"
            raise host_refused(action, error, denied=_PERMISSION_HINT) from error

    def keep(self, instance_id: InstanceId, password: bytes) -> bool:
        """Keep a password for good; `False` when the instance has one already, which stays.

        Of two that come at once, one is kept, and no reader ever sees a part of it.

        Raises:
            HostRefused: The file system is full or read-only; nothing is kept.
            PrivilegeMissing: This process may not write there.
        """
        path = self._path(instance_id)
        new = path.with_name(f".{path.name}.{threading.get_native_id()}.new")
        write_atomic(new, password, mode=_FILE_MODE, durable=True)
        try:
            # A link fails where the name exists, as O_EXCL does, but brings the whole file with it.
            path.hardlink_to(new)
        except FileExistsError:
            return False
        except OSError as error:
            action = f"keep the password of {instance_id}"
            raise host_refused(action, error, denied=_PERMISSION_HINT) from error
        finally:
            new.unlink(missing_ok=True)
        sync_directory(self._directory)
        return True

    def remove(self, instance_id: InstanceId) -> bool:
        """Forget the instance's password; `False` when it has none.

        Raises:
            HostRefused: The file system is read-only.
            PrivilegeMissing: This process may not write there.
        """
        action = f"remove the password of {instance_id}"
        return remove_file(self._path(instance_id), action, denied=_PERMISSION_HINT)

    def _path(self, instance_id: InstanceId) -> Path:
        return self._directory / instance_id
