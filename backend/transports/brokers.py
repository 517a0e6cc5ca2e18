"""Message brokers behind one interface: Kafka, Redis streams, NATS JetStream, RabbitMQ.

Knows their clients, and nothing of photos. Each gives a message again unless it is told that the message is done: to
another consumer of the group when this one is gone, and to the same one when the connection was lost. What is published
is there, as safely as the broker keeps things, when `publish` returns. Each is used by one thread.

    kafka://host:9092,host2:9092      confluent-kafka; a group shares the topic's partitions, so ten workers need ten
    redis://:password@host:6379/0     a stream and its consumer group; needs Redis 6.2
    nats://user:password@host:4222    JetStream; a stream for the three subjects is made where none has them
    amqp://user:password@host:5672/   durable queues with publisher confirms
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, unquote

from backend.errors import CommandError, extra_needed

CONFIRM_S = 30.0  # for which a broker may take to confirm what was published
CLAIM_EVERY_S = 5.0  # how often a Redis consumer looks for messages of those that are gone
KEY_HEADER = "Facings-Key"  # of a NATS message, percent-encoded
MAX_FETCHED_KB = 64 * 1024  # messages that a Kafka client reads ahead


class BrokerError(Exception):
    """The broker is away, or refuses. One line, without passwords."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A message. key: the producer's, or None. attempts: how often it was delivered, this time included, where the
    broker counts that; else 1. handle: the broker's own."""

    content: bytes
    key: str | None
    attempts: int
    handle: Any


@dataclass(frozen=True, kw_only=True)
class Topics:
    """Names of the topics (streams, subjects, queues), and of the consumer group."""

    requests: str = "facings.requests"
    answers: str = "facings.answers"
    errors: str = "facings.errors"
    group: str = "facings"


class Broker(Protocol):
    """A connection. All methods raise BrokerError."""

    def take(self, timeout_s: float) -> Delivery | None:
        """The next message, or None when none came in that time."""
        ...

    def publish(self, topic: str, key: str, content: bytes) -> None:
        """Returns when the broker has it."""
        ...

    def done(self, delivery: Delivery) -> None:
        """Nobody in the group will get it again."""
        ...

    def close(self) -> None:
        """Ends the connection; what was taken and is not done will be given again. Never raises."""
        ...


def server_name(url: str) -> str:
    """The address of a server as it may stand in messages: without user, password and options."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def connector(
    url: str, topics: Topics, *, redeliver_after_s: float, max_bytes: int, kafka_config: Mapping[str, Any] | None = None
) -> Callable[[], Broker]:
    """Makes connections to the broker at `url`.

    redeliver_after_s: when NATS and Redis give a message to another consumer; longer than any photo takes.
    max_bytes: of a message. kafka_config: more of librdkafka's settings, such as those of TLS and SASL.
    Raises CommandError for a scheme that is none, or whose client is not installed.
    """
    scheme = url.partition("://")[0]
    with extra_needed("brokers", f"{scheme}://"):
        match scheme:
            case "kafka":
                import confluent_kafka  # noqa: F401

                if "@" in url:
                    raise CommandError(f"{server_name(url)}: expected user and password in --kafka-config")

                return lambda: _Kafka(url, topics, max_bytes, kafka_config or {})
            case "redis" | "rediss":
                return lambda: _Redis(url, topics, redeliver_after_s)
            case "nats" | "tls":
                import nats  # noqa: F401

                return lambda: _Nats(url, topics, redeliver_after_s)
            case "amqp" | "amqps":
                import pika  # noqa: F401

                return lambda: _Amqp(url, topics)
    raise CommandError(f"{server_name(url)!r}: expected kafka://, redis://, nats:// or amqp://, got another address")


@contextmanager
def _errors(url: str, *kinds: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        text = " ".join(str(error).split()) or "no reason given"
        raise BrokerError(f"{server_name(url)}: {type(error).__name__}: {text[:300]}") from None


class _Kafka:
    def __init__(self, url: str, topics: Topics, max_bytes: int, config: Mapping[str, Any]) -> None:
        from confluent_kafka import Consumer, KafkaException, Producer

        self._url, self._kinds = url, (KafkaException, BufferError)
        servers = server_name(url).partition("://")[2].rstrip("/")
        shared = {"bootstrap.servers": servers, "log_level": 2, "socket.keepalive.enable": True, **config}
        with self._errors():
            self._consumer = Consumer(
                {
                    **shared,
                    "group.id": topics.group,
                    "enable.auto.commit": False,
                    "auto.offset.reset": "earliest",
                    "max.poll.interval.ms": 600_000,
                    "queued.max.messages.kbytes": MAX_FETCHED_KB,
                    "fetch.message.max.bytes": max_bytes,
                }
            )
            self._producer = Producer({**shared, "acks": "all", "message.max.bytes": max_bytes, "linger.ms": 0})
            self._consumer.list_topics(topics.requests, timeout=10)  # or the server is away
            self._consumer.subscribe([topics.requests])

    def take(self, timeout_s: float) -> Delivery | None:
        from confluent_kafka import KafkaError, KafkaException

        with self._errors():
            message = self._consumer.poll(timeout_s)
            if message is None:
                return None
            if (error := message.error()) is not None:
                if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:  # nobody has published yet
                    return None
                raise KafkaException(error)
        key = message.key()
        text = key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else None
        return Delivery(content=message.value() or b"", key=text, attempts=1, handle=message)

    def publish(self, topic: str, key: str, content: bytes) -> None:
        from confluent_kafka import KafkaException

        outcome: list[Any] = []
        with self._errors():
            self._producer.produce(topic, content, key.encode(), on_delivery=lambda error, _: outcome.append(error))
            self._producer.flush(CONFIRM_S)
            if not outcome:
                self._producer.purge()
                raise BufferError(f"not confirmed within {CONFIRM_S:.0f} s")
            if outcome[0] is not None:
                raise KafkaException(outcome[0])

    def done(self, delivery: Delivery) -> None:
        with self._errors():
            self._consumer.commit(message=delivery.handle, asynchronous=False)

    def close(self) -> None:
        with suppress(Exception):
            self._consumer.close()

    def _errors(self) -> Any:
        return _errors(self._url, *self._kinds)


class _Redis:
    def __init__(self, url: str, topics: Topics, redeliver_after_s: float) -> None:
        import redis

        self._url, self._topics, self._kinds = url, topics, (redis.RedisError, ValueError)
        self._idle_ms = int(redeliver_after_s * 1000)
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}"
        self._claimed_s = float("-inf")
        with self._errors():
            self._client = redis.Redis.from_url(url, socket_connect_timeout=5, socket_keepalive=True)
            try:
                self._client.xgroup_create(topics.requests, topics.group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    def take(self, timeout_s: float) -> Delivery | None:
        name, group = self._topics.requests, self._topics.group
        with self._errors():
            if time.monotonic() - self._claimed_s > min(CLAIM_EVERY_S, self._idle_ms / 1000):
                claimed = self._client.xautoclaim(name, group, self._consumer, self._idle_ms, "0", count=1)[1]
                if claimed:
                    return self._delivery(*claimed[0])
                self._claimed_s = time.monotonic()
            read: Any = self._client.xreadgroup(group, self._consumer, {name: ">"}, 1, max(1, int(timeout_s * 1000)))
            if not read:
                return None
            rows = read[0][1] if isinstance(read, list) else next(iter(read.values()))
            return self._delivery(*(rows[0] if isinstance(rows[0], tuple) else rows[0][0]))

    def _delivery(self, number: bytes, fields: Mapping[bytes, bytes] | None) -> Delivery:
        fields = fields or {}  # None where the entry was deleted meanwhile
        pending: Any = self._client.xpending_range(self._topics.requests, self._topics.group, number, number, 1)
        attempts = int(pending[0]["times_delivered"]) if pending else 1
        key = fields.get(b"key")
        text = key.decode("utf-8", "backslashreplace") if key else None
        return Delivery(content=fields.get(b"data", b""), key=text, attempts=attempts, handle=number)

    def publish(self, topic: str, key: str, content: bytes) -> None:
        with self._errors():
            self._client.xadd(topic, {"key": key, "data": content})

    def done(self, delivery: Delivery) -> None:
        with self._errors():
            self._client.xack(self._topics.requests, self._topics.group, delivery.handle)

    def close(self) -> None:
        with suppress(Exception):
            self._client.close()

    def _errors(self) -> Any:
        return _errors(self._url, *self._kinds)


class _Nats:
    """nats-py is asynchronous: each call runs its loop to the end of what it asks for."""

    def __init__(self, url: str, topics: Topics, redeliver_after_s: float) -> None:
        self._url, self._topics = url, topics
        self._loop = asyncio.new_event_loop()
        self._client: Any = None
        try:
            self._run(self._connect(redeliver_after_s))
        except BrokerError:
            self.close()
            raise

    async def _connect(self, redeliver_after_s: float) -> None:
        import nats
        from nats.js.api import ConsumerConfig
        from nats.js.errors import NotFoundError

        async def ignore(_: Exception) -> None:
            """What goes wrong is raised by the call that needs it."""

        self._client = await nats.connect(
            self._url, connect_timeout=5, allow_reconnect=False, max_reconnect_attempts=1, error_cb=ignore
        )
        self._stream = self._client.jetstream(timeout=CONFIRM_S)
        for subject in (self._topics.requests, self._topics.answers, self._topics.errors):
            try:
                await self._stream.find_stream_name_by_subject(subject)
            except NotFoundError:
                await self._stream.add_stream(name=subject.replace(".", "-"), subjects=[subject])
        config = ConsumerConfig(ack_wait=redeliver_after_s, max_deliver=-1)
        self._subscription = await self._stream.pull_subscribe(self._topics.requests, self._topics.group, config=config)

    def take(self, timeout_s: float) -> Delivery | None:
        from nats.errors import TimeoutError as NothingCame

        async def fetch() -> Any:
            try:
                return (await self._subscription.fetch(1, timeout=timeout_s))[0]
            except (NothingCame, TimeoutError):
                if self._client.is_closed or not self._client.is_connected:
                    raise
                return None

        message = self._run(fetch())
        if message is None:
            return None
        headers = message.headers or {}
        key = unquote(headers[KEY_HEADER]) if KEY_HEADER in headers else headers.get("Nats-Msg-Id")
        return Delivery(content=message.data, key=key, attempts=message.metadata.num_delivered, handle=message)

    def publish(self, topic: str, key: str, content: bytes) -> None:
        # Not as Nats-Msg-Id: within two minutes, a second answer to a request that is sent again would be dropped.
        self._run(self._stream.publish(topic, content, headers={KEY_HEADER: quote(key)}))

    def done(self, delivery: Delivery) -> None:
        self._run(delivery.handle.ack_sync(timeout=CONFIRM_S))

    def close(self) -> None:
        with suppress(Exception):
            if self._client is not None:
                self._run(self._client.close())
            self._run(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _run(self, work: Any) -> Any:
        from nats.errors import Error

        with _errors(self._url, Error, OSError, TimeoutError, asyncio.CancelledError):
            return self._loop.run_until_complete(work)


class _Amqp:
    def __init__(self, url: str, topics: Topics) -> None:
        import pika

        self._url, self._kinds = url, (pika.exceptions.AMQPError, OSError, ValueError)
        with self._errors():
            parameters = pika.URLParameters(url)
            # No heartbeats are answered while a photo is boxed.
            parameters.heartbeat, parameters.socket_timeout, parameters.blocked_connection_timeout = 600, 10, CONFIRM_S
            self._connection = pika.BlockingConnection(parameters)
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
            self._channel.basic_qos(prefetch_count=1)
            for name in (topics.requests, topics.answers, topics.errors):
                self._channel.queue_declare(name, durable=True)
        self._requests = topics.requests

    def take(self, timeout_s: float) -> Delivery | None:
        with self._errors():
            method, properties, content = next(self._channel.consume(self._requests, inactivity_timeout=timeout_s))
        if method is None:
            return None
        counted = (properties.headers or {}).get("x-delivery-count")  # quorum queues count
        attempts = int(counted) + 1 if counted is not None else 1 + bool(method.redelivered)
        return Delivery(content=content, key=properties.message_id, attempts=attempts, handle=method.delivery_tag)

    def publish(self, topic: str, key: str, content: bytes) -> None:
        import pika

        persistent = pika.BasicProperties(content_type="application/json", delivery_mode=2, message_id=key[:255])
        with self._errors():
            self._channel.basic_publish("", topic, content, persistent, mandatory=True)

    def done(self, delivery: Delivery) -> None:
        with self._errors():
            self._channel.basic_ack(delivery.handle)

    def close(self) -> None:
        with suppress(Exception):
            self._connection.close()

    def _errors(self) -> Any:
        return _errors(self._url, *self._kinds)
