"""A small server for tests, and ways to talk to it."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import uvicorn
from small_corpus import make_lively_model

import serve
from data.tokenizer import Tokenizer
from inference.batching import Batcher
from inference.generate import generate
from inference.sampling import Sampling
from inference.server import Service, make_app
from model import GPT

JSON_HEADERS = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A running server, its model, and ways to talk to it."""

    def __init__(self, port: int, service: Service):
        self.port, self.service, self.batcher = port, service, service.batcher
        self.model, self.tokenizer = service.batcher.model, service.batcher.tokenizer

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        """Send `body`, bytes or what becomes JSON, and read the whole answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, data, {**JSON_HEADERS, **named})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def send(self, data: bytes) -> Answer:
        """Send bytes as they are, and read one answer."""
        with self.opened(data) as connection:
            response = http.client.HTTPResponse(connection)
            response.begin()
            return Answer(response.status, response.headers, response.read())

    def opened(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def metric(self, name: str) -> int:
        lines = self.ask("/metrics").body.decode().splitlines()
        return int(dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))[f"codegpt_{name}"])

    def greedy(self, prompt: str | list[str], max_tokens: int, **options: Any) -> str:
        """What the decoder alone writes."""
        sampling = Sampling(max_tokens, temperature=0)
        stop_ids = set(self.tokenizer.specials.values())
        return generate(self.model, self.tokenizer, prompt, sampling, stop_ids=stop_ids, **options)[0].text

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Row i has the logarithms of the probabilities of what follows ids[: i + 1]."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids]))[0].float()
        return logits.index_fill(-1, self.batcher.banned, -torch.inf).log_softmax(-1)


@contextmanager
def serving(
    model: GPT, tokenizer: Tokenizer, max_rows: int = 4, max_waiting: int = 256, **settings: Any
) -> Iterator[Server]:
    with Batcher(model, tokenizer, max_rows, max_waiting) as running:
        service = Service(running, "starcoder-style-test", **settings)
        server = uvicorn.Server(uvicorn.Config(make_app(service), http=serve.protocol(), port=0, log_level="critical"))
        server.config.load()
        bound = server.config.bind_socket()
        bound.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield Server(bound.getsockname()[1], service)
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
            bound.close()


def eventually(condition: Callable[[], bool], within: float = 20.0) -> bool:
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def readable_model(tokenizer: Tokenizer) -> GPT:
    """As lively_model, with a context of 256, and its texts are ASCII: as many characters as their tokens."""
    model = make_lively_model(block_size=256)
    readable = [i for i, token in enumerate(tokenizer.tokens) if re.fullmatch(rb"[\n -~]+", token)]
    unlikely = torch.ones(640, dtype=torch.bool)
    unlikely[readable] = False
    with torch.no_grad():
        model.wte.weight.mul_(2)[unlikely] = 0
    return model
