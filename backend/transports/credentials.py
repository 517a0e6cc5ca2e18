"""Who may ask: the user name and the password of the settings, the same for all transports of the server.

Knows the settings only.
"""

from __future__ import annotations

import hmac

from backend.errors import AuthError
from backend.settings import Settings


def check_credentials(settings: Settings, user: str | None, password: str | None) -> None:
    """Raises AuthError unless they are those of the settings, or the settings have none."""
    if settings.basic_auth_user is None or settings.basic_auth_pass is None:
        return
    # Both are always compared, in constant time.
    is_user = hmac.compare_digest((user or "").encode(), settings.basic_auth_user.encode())
    is_password = hmac.compare_digest((password or "").encode(), settings.basic_auth_pass.encode())
    if not (is_user & is_password):
        raise AuthError("expected the user name and password that this backend was started with")
