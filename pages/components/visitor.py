"""Who sits in front of the browser: the login whose event is being handled."""

from gradio.context import LocalContext


def visitor() -> str:
    """Name of the login, "" where the server asks for none; then whoever reaches it may do everything."""
    request = LocalContext.request.get(None)
    return (request.username or "") if request is not None else ""
