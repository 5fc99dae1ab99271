"""How a secret may be spelled in a text, beside as it is."""

import base64
import json
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus


def spellings_of(secret: bytes) -> Iterator[str]:
    """Raw, in base64 on its own and inside other data, hexadecimal, JSON and URL form."""
    text = secret.decode(errors="replace")
    yield from (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    yield from (quote(text), quote(text, safe=""), quote_plus(text))
    yield re.sub("%..", lambda found: found[0].lower(), quote(text))
    yield from (secret.hex(), secret.hex().upper())
    yield base64.b64encode(secret).decode().rstrip("=")
    yield base64.urlsafe_b64encode(secret).decode().rstrip("=")
    for before in range(3):
        # The characters of it that are the same whatever stands before and behind.
        one, other = (
            base64.b64encode(around * before + secret + around * 3).decode()
            for around in (b"\x00", b"\xff")
        )
        same = [at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] == pair[1]]
        yield one[same[0] : same[-1] + 1]
