"""Makes the endpoint's token, and reads it from a file that only its owner can read."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from flaskd.errors import CannotCreateError, ConfigError

_RANDOM_BYTES = 32
_MAX_BYTES = 4096
_FEWEST_CHARACTERS = 8
"""How many different characters a token needs: 32 random bytes have twice as many, placeholders have fewer."""
_OTHERS = 0o077

_MAKE_ONE = "make one with: (umask 077; head -c 32 /dev/urandom | base64 > FILE)"


def make_token(path: str | os.PathLike[str]) -> Path:
    """Write a new token to a new file that only its owner can read, and return the path.

    Raises CannotCreateError if the file exists or cannot be made.
    """
    path = Path(path)
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CannotCreateError(f'cannot make a token file: "{path}" exists; remove it to get a new token') from None
    except OSError as error:
        raise CannotCreateError(f'cannot make a token file "{path}": {error.strerror}') from error
    with os.fdopen(number, "w") as file:
        file.write(secrets.token_urlsafe(_RANDOM_BYTES) + "\n")
    return path


def configured_token(token_file: Path | None, credential: str | None, environ: Mapping[str, str]) -> bytes:
    """Read the token from the file, or from the systemd credential of that name.

    Raises ConfigError if it cannot be read, if others may read it, or if it is too short to be a secret.
    """
    if (token_file is None) == (credential is None):
        raise ConfigError("cannot open the shutdown endpoint: it needs either a token file or a credential")
    if token_file is not None:
        return _token(_read(token_file, private=True), token_file)
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise ConfigError(
            f'cannot read the credential "{credential}": $CREDENTIALS_DIRECTORY is not set; '
            "the unit needs LoadCredential= (systemd.exec(5))"
        )
    path = Path(directory, str(credential))
    # systemd owns the directory; an access control list for the unit's user shows as a wider mode.
    return _token(_read(path, private=False), path)


def _read(path: Path, *, private: bool) -> bytes:
    """The content of a file; the checks apply to the file that was opened, even if a link led to it."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer (fifo(7)).
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a usable path"
        raise ConfigError(f'cannot read the token file "{path}": {reason}; {_MAKE_ONE}') from error
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f'cannot use the token file "{path}": it is not a regular file')
        if private and os.name == "posix":
            _check_private(found, path)
        return os.read(number, _MAX_BYTES + 1)
    finally:
        os.close(number)


def _check_private(found: os.stat_result, path: Path) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f'cannot use the token file "{path}": it belongs to uid {found.st_uid}, '
            f"and flaskd runs as uid {os.geteuid()}; let it belong to that user"
        )
    if found.st_mode & _OTHERS:
        raise ConfigError(
            f'cannot use the token file "{path}": its mode is {stat.S_IMODE(found.st_mode):04o}, which lets others at '
            "it; expected 0600 or narrower: make a new token, for this one may be known"
        )


def _token(content: bytes, path: Path) -> bytes:
    token = content.strip(b"\r\n")
    # The characters that a header may have here: RFC 6750 §2.1, b64token.
    if len(content) > _MAX_BYTES or not re.fullmatch(rb"[A-Za-z0-9._~+/-]+=*", token):
        raise ConfigError(f'cannot use the token file "{path}": expected one line of base64 or hex; {_MAKE_ONE}')
    characters = token.rstrip(b"=")
    bits = 4 if re.fullmatch(rb"[0-9A-Fa-f]+", characters) else 6
    if len(characters) * bits < _RANDOM_BYTES * 8 or len(set(characters)) < _FEWEST_CHARACTERS:
        raise ConfigError(
            f'cannot use the token file "{path}": expected at least {_RANDOM_BYTES} random bytes in base64 or hex, '
            f"got less; {_MAKE_ONE}"
        )
    return token
