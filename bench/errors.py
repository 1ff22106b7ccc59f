"""What a person running a benchmark can mend."""

from __future__ import annotations

from sl_serve.errors import UserError


class BenchError(UserError):
    """The benchmark cannot be run as asked, or a system did not do the work it claims."""
