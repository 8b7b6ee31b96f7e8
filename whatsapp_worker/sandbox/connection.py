"""One client's TCP connection: proxy, TLS, HTTP, WebSocket, noise, stanzas.

Everything runs inside `data_received`, without a task or an await per frame. Whatever a client
sends, the worst that happens is the end of its own connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from whatsapp_worker.sandbox import websocket
from whatsapp_worker.sandbox.binary import Codec, MalformedNode, Node
from whatsapp_worker.sandbox.model import Attempt, Session
from whatsapp_worker.sandbox.noise import PROLOGUE, Cipher, NoiseFailed, ServerHandshake
from whatsapp_worker.sandbox.websocket import ProtocolViolation

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.media import Media
    from whatsapp_worker.sandbox.network import Network

log = logging.getLogger(__name__)

CHAT_HOST = "web.whatsapp.com"
HANDSHAKE_LIMIT_S = 30.0
MAX_HELD_STANZAS = 20_000
MAX_FRAME_BYTES = 1 << 24
MAX_UNREAD_BYTES = 64 << 20  # a client that takes nothing any more is dropped
_LINGER_0 = struct.pack("ii", 1, 0)  # close() then sends a reset


class Connection(asyncio.Protocol):
    """A link of the network, once its handshake is done.

    Args:
        network: Where stanzas go.
        codec: Reads and writes them.
        tls: Speaks for every host that a client asks the proxy for.
        handshake: Makes the server's side of a new handshake.
        media: Answers plain HTTPS requests.
    """

    attempt: Attempt

    def __init__(
        self,
        *,
        network: Network,
        codec: Codec,
        tls: ssl.SSLContext,
        handshake: Callable[[], ServerHandshake],
        media: Media,
    ) -> None:
        self._network = network
        self._codec = codec
        self._tls = tls
        self._make_handshake = handshake
        self._media = media
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._buffer = bytearray()  # bytes as the transport gave them
        self._frames = bytearray()  # content of WebSocket messages
        self._step: Callable[[], bool] = self._read_connect
        self._handshake: ServerHandshake | None = None
        self._reader: Cipher | None = None
        self._writer: Cipher | None = None
        self._session: Session | None = None
        self._is_stalled = False
        self._held: list[Node] = []
        self._task: asyncio.Task[None] | None = None
        self._limit: asyncio.TimerHandle | None = None

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._socket = transport.get_extra_info("socket")
        if not self._network.opened(self):
            self.reset("refused")
            return
        loop = asyncio.get_running_loop()
        self._limit = loop.call_later(HANDSHAKE_LIMIT_S, self._limit_handshake)

    def data_received(self, data: bytes) -> None:
        """Bytes came: take as many whole steps as they allow."""
        self._buffer += data
        if not self._is_stalled:
            self._go_on()

    def eof_received(self) -> bool:
        """The client will send no more."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        self.attempt.end("lost" if error else "closed by client")
        self._transport = None
        if self._limit is not None:
            self._limit.cancel()
        self._network.closed(self)
        if self._session is not None:
            self._session.lost()

    # Link

    def send(self, node: Node) -> None:
        """Send a stanza; nothing happens when the connection is gone."""
        if self._transport is None or self._writer is None:
            return
        if self._is_stalled:
            if len(self._held) < MAX_HELD_STANZAS:
                self._held.append(node)
            return
        if self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self._abort("reads nothing")
            return
        ciphertext = self._writer.encrypt(self._codec.encode(node))
        self._write_frame(ciphertext)

    def close(self, why: str) -> None:
        """End it as a server does on purpose."""
        transport = self._let_go()
        if transport is None:
            return
        self.attempt.end(why)
        if self._writer is not None:
            transport.write(websocket.frame(b"\x03\xe8", websocket.CLOSE))
        transport.close()

    def reset(self, why: str) -> None:
        """End it as a broken network does: TCP reset."""
        transport = self._let_go()
        if transport is None:
            return
        self.attempt.end(why)
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        transport.abort()

    def _let_go(self) -> asyncio.Transport | None:
        """The transport, to be ended; asyncio's is not to be touched again after its end."""
        transport, self._transport = self._transport, None
        return transport

    def stall(self, on: bool) -> None:
        """Begin or end silence; what is held back is exchanged when it ends."""
        if on == self._is_stalled or self._transport is None:
            return
        self._is_stalled = on
        if on:
            self._transport.pause_reading()
            return
        self._transport.resume_reading()
        held, self._held = self._held, []
        for node in held:
            self.send(node)
        self._go_on()

    # Steps

    def _go_on(self) -> None:
        try:
            while self._transport is not None and not self._is_stalled and self._step():
                pass
        except (ProtocolViolation, NoiseFailed, MalformedNode) as error:
            log.info("sandbox.client_rejected", extra={"error": str(error)})
            self._abort(f"rejected: {error}")
        except Exception:
            log.exception("sandbox.stanza_failed")
            self._abort("failed inside the sandbox")

    def _abort(self, why: str) -> None:
        self.attempt.end(why)
        if (transport := self._let_go()) is not None:
            transport.abort()

    def _limit_handshake(self) -> None:
        if self._writer is None and not self._is_stalled:
            self._abort("handshake took too long")

    def _read_connect(self) -> bool:
        request = websocket.read_head(self._buffer)
        if request is None:
            return False
        if request.method != "CONNECT":
            raise ProtocolViolation("no CONNECT: this port is a proxy")
        self.attempt.reached = "proxied"
        self._step = self._wait
        self._host = request.target.rpartition(":")[0]
        self._task = asyncio.get_running_loop().create_task(self._start_tls())
        return False

    async def _start_tls(self) -> None:
        if self._transport is None:  # ended meanwhile
            return
        self._transport.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                self._transport, self, self._tls, server_side=True, ssl_handshake_timeout=20
            )
        except (OSError, ssl.SSLError, RuntimeError) as error:
            log.info("sandbox.client_rejected", extra={"error": str(error)})
            self.attempt.end("no TLS")
            if self._transport is not None:
                self.connection_lost(error)
            return
        if encrypted is None:
            return
        self._transport = encrypted
        self.attempt.reached = "encrypted"
        self._step = self._read_request
        if self._is_stalled:
            self._transport.pause_reading()
        self._go_on()

    def _wait(self) -> bool:
        return False

    def _read_request(self) -> bool:
        request = websocket.read_head(self._buffer)
        if request is None:
            return False
        assert self._transport is not None
        if self._host != CHAT_HOST:
            if self._limit is not None:  # there is no handshake, and files take their time
                self._limit.cancel()
            self._step = self._media.step(request, self._buffer, self._transport, self._next)
            return True
        self._transport.write(websocket.upgrade(request))
        self._step = self._read_prologue
        return True

    def _next(self) -> None:
        self._step = self._read_request

    def _read_prologue(self) -> bool:
        if not self._read_websocket():
            return False
        if len(self._frames) < len(PROLOGUE):
            return True
        if not self._frames.startswith(PROLOGUE):
            raise ProtocolViolation("no WhatsApp prologue")
        del self._frames[: len(PROLOGUE)]
        self._handshake = self._make_handshake()
        self._step = self._read_hello
        return True

    def _read_hello(self) -> bool:
        frame = self._next_frame()
        if frame is None:
            return self._read_websocket()
        assert self._handshake is not None
        self._write_frame(self._handshake.hello(frame))
        self._step = self._read_finish
        return True

    def _read_finish(self) -> bool:
        frame = self._next_frame()
        if frame is None:
            return self._read_websocket()
        assert self._handshake is not None
        key, payload, self._reader, self._writer = self._handshake.finish(frame)
        self._handshake = None
        self.attempt.reached = "handshaken"
        self._step = self._read_stanza
        self._session = self._network.admit(self, key, payload)
        return True

    def _read_stanza(self) -> bool:
        frame = self._next_frame()
        if frame is None:
            return self._read_websocket()
        assert self._reader is not None
        node = self._codec.decode(self._reader.decrypt(frame))
        if self._session is not None:
            self._session.handle(node)
        return True

    # Frames

    def _next_frame(self) -> bytes | None:
        """Take one length-prefixed frame off what WebSocket messages brought."""
        if len(self._frames) < 3:
            return None
        end = 3 + int.from_bytes(self._frames[:3], "big")
        if len(self._frames) < end:
            return None
        frame = bytes(self._frames[3:end])
        del self._frames[:end]
        return frame

    def _read_websocket(self) -> bool:
        """Take one WebSocket frame; False while it is not whole."""
        frame = websocket.read_frame(self._buffer)
        if frame is None:
            return False
        opcode, payload = frame
        if opcode == websocket.CLOSE:
            if self._transport is not None:
                self._transport.write(websocket.frame(payload[:2], websocket.CLOSE))
            self.attempt.end("closed by client")
            self._abort_politely()
        elif opcode == websocket.PING and self._transport is not None:
            self._transport.write(websocket.frame(payload, websocket.PONG))
        elif opcode in (websocket.BINARY, websocket.CONTINUATION):
            self._frames += payload
            if len(self._frames) > MAX_FRAME_BYTES + websocket.MAX_MESSAGE_BYTES:
                raise ProtocolViolation("a frame that never ends")
        elif opcode != websocket.PONG:
            raise ProtocolViolation(f"a WebSocket message of type {opcode}")
        return True

    def _abort_politely(self) -> None:
        if (transport := self._let_go()) is not None:
            transport.close()

    def _write_frame(self, frame: bytes) -> None:
        if self._transport is not None:
            self._transport.write(websocket.frame(len(frame).to_bytes(3, "big") + frame))
