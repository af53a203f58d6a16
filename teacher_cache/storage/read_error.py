"""The error for a file of a cache that could not be read."""

from ray_distill.first_line import first_line
from ray_distill.object_store import advice_about_store
from ray_distill.teacher_cache.storage.cache import damage_error
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError
from ray_distill.teacher_cache.storage.store import Store


def read_error(store: Store, name: str, error: Exception) -> CacheError:
    """Return the error for a file that could not be read: damage, unless an object store did not give the file."""
    reason = first_line(error)
    if store.local is None and advice_about_store(str(error)):
        return CacheAccessError(f"{store.at(name)} can't be read ({reason})")  # The command line adds the advice.
    if store.local is None and isinstance(error, ConnectionError | TimeoutError | PermissionError):
        return CacheAccessError(f"{store.at(name)} can't be read ({reason}); run the same command again")
    return damage_error(store, name, f"is damaged ({reason})")
