"""What to do about an error of an object store, whose own messages say only what happened."""

_KEYS = "check the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and what they may do in this bucket"
_BUSY = "the store was too busy; run the same command again, or lower the number of workers"
_REACH = "check AWS_ENDPOINT_URL, and that this machine reaches it"
_ADVICE = {
    "ACCESS_DENIED": _KEYS,
    "INVALID_ACCESS_KEY_ID": _KEYS,
    "INVALID_CLIENT_TOKEN_ID": _KEYS,
    "SIGNATURE_DOES_NOT_MATCH": _KEYS,
    "MISSING_AUTHENTICATION_TOKEN": _KEYS,
    "REQUEST_EXPIRED": "the keys have expired, or the clock of this machine is wrong",
    "NO_SUCH_BUCKET": "create the bucket, or correct its name",
    "NETWORK_CONNECTION": _REACH,
    "REQUEST_TIMEOUT": _REACH,
    "SLOW_DOWN": _BUSY,
    "SERVICE_UNAVAILABLE": _BUSY,
    "THROTTLING": _BUSY,
    "UNKNOWN (HTTP status 503)": _BUSY,  # The answer to HEAD has no body with a name of the error.
    "UNKNOWN (HTTP status 301)": "check AWS_REGION, since the bucket is in another one",
}


def advice_about_store(message: str) -> str:
    """Return what to do about Arrow's message of an error of S3; empty for all other messages."""
    return next((advice for code, advice in _ADVICE.items() if f"AWS Error {code} " in message), "")
