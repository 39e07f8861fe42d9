"""The dialects that this server speaks: a row each. The first one's errors are those of paths that no dialect owns."""

from __future__ import annotations

from app.dialects.dialect import Dialect
from app.dialects.openai import OPENAI

DIALECTS: tuple[Dialect, ...] = (OPENAI,)
