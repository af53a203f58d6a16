"""A client of the service, sync and async. Copy it: it needs httpx and NumPy only."""

import io
import time
from collections.abc import Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Space = Literal["student", "teacher"]


class RefusedError(Exception):
    """The service refused; ``status`` and ``error_type`` are in docs/in-depth/serving.md.

    ``retry_after``: seconds after which to ask again, or None where that would not help.
    """

    def __init__(self, response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "")
        body = response.json() if kind.startswith("application/json") else {}
        super().__init__(body.get("error", response.text[:200]))
        self.status, self.error_type = response.status_code, body.get("error_type", "unknown")
        self.retry_after = _seconds(response.headers.get("retry-after"))


def _seconds(retry_after: str | None) -> float | None:
    """Of a ``Retry-After``: seconds or, as proxies may say, a date. None for none and for what is neither."""
    if retry_after is None:
        return None
    with suppress(ValueError):
        return float(retry_after)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None


def _request(path: str, files: Sequence[bytes], **parameters: Any) -> dict[str, Any]:
    form = [("file", ("audio", file)) for file in files]
    return {"method": "POST", "url": path, "files": form, "params": parameters}


def _arrays(response: httpx.Response) -> list[Array]:
    if response.status_code != 200:
        raise RefusedError(response)
    archive = np.load(io.BytesIO(response.content), allow_pickle=False)
    return [archive[str(index)] for index in range(len(archive.files))]


def _vectors(response: httpx.Response) -> Array:
    if response.status_code != 200:
        raise RefusedError(response)
    return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


class Client:
    """
    Example:
        >>> with Client("http://127.0.0.1:8000") as client:
        ...     (features,) = client.features([Path("speech.flac").read_bytes()], layer=3)
    """

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def features(self, files: Sequence[bytes], layer: int | str = "last", space: Space = "student") -> list[Array]:
        """(T, d) float32 for each file, or (L, T, d) where layer is ``all``; RefusedError where the service refuses."""
        request = _request("/v1/features", files, layer=layer, space=space, format="npz")
        return _arrays(self._http.request(**request))

    def embeddings(self, files: Sequence[bytes], layer: int | str = "last", pooling: str = "mean") -> Array:
        """(N, d) float32, (N, 2 d) for ``mean_std``; RefusedError where the service refuses."""
        return _vectors(self._http.request(**_request("/v1/embeddings", files, layer=layer, pooling=pooling)))


class AsyncClient:
    """`Client`, awaited."""

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=address, headers=headers, timeout=timeout)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def features(
        self, files: Sequence[bytes], layer: int | str = "last", space: Space = "student"
    ) -> list[Array]:
        """As `Client.features`."""
        request = _request("/v1/features", files, layer=layer, space=space, format="npz")
        return _arrays(await self._http.request(**request))

    async def embeddings(self, files: Sequence[bytes], layer: int | str = "last", pooling: str = "mean") -> Array:
        """As `Client.embeddings`."""
        return _vectors(await self._http.request(**_request("/v1/embeddings", files, layer=layer, pooling=pooling)))
