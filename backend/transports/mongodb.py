"""Answers as documents in MongoDB, for consumers without code.

Knows pymongo. A document's `_id` is the answer's key, so that an answer that comes twice is one document.
"""

from __future__ import annotations

from typing import Any

from backend.errors import CommandError, extra_needed
from backend.transports.brokers import BrokerError, server_name

COLLECTION = "answers"
TIMEOUT, TIMEOUT_MS = "serverSelectionTimeoutMS", 5000  # for which a server may be away before an answer is not stored


class MongoStore:
    """The collection `answers` of the database in `mongodb://user:password@host:27017/database`."""

    def __init__(self, url: str) -> None:
        """Raises CommandError when the server cannot be reached, or the address names no database."""
        with extra_needed("mongodb", "--store"):
            import pymongo
            from pymongo.errors import PyMongoError
        self._url, self._error = url, PyMongoError
        self._client: Any = None
        try:
            options: dict[str, Any] = {} if TIMEOUT in url else {TIMEOUT: TIMEOUT_MS}
            self._client = pymongo.MongoClient(url, **options)
            self._collection = self._client.get_default_database()[COLLECTION]
            self._client.admin.command("ping")
        except (PyMongoError, ValueError) as error:
            self.close()
            raise CommandError(f"--store {server_name(url)}: {_line(error)}") from None

    def put(self, key: str, document: dict[str, Any]) -> None:
        """Stores or replaces the answer with this key. Raises BrokerError."""
        try:
            self._collection.replace_one({"_id": key}, {"_id": key, **document}, upsert=True)
        except self._error as error:
            raise BrokerError(f"{server_name(self._url)}: {_line(error)}") from None

    def close(self) -> None:
        """Ends the connections."""
        if self._client is not None:
            self._client.close()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
