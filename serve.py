"""Serve a trained model over HTTP: to editors, to OpenAI's clients, and to a page for trying it at /.

    python serve.py --out_dir=out/tiny                            # http://127.0.0.1:8012
    python serve.py --out_dir=out/fim --one_line=True             # editors: complete to the end of the line
    python serve.py --out_dir=out/tiny --host=0.0.0.0 --api_key=SECRET     # other machines too

pip install starlette uvicorn. docs/editors.md says how to set up editors. inference/server.py has the protocols.
"""

import asyncio
import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from evaluation.doctests import doctest_check
from inference.batching import Batcher, in_a_thread
from inference.optimize import QUANTIZATIONS, optimize
from model import GPT
from runtime.config import run_stage
from runtime.device import DTYPES, resolve_device
from runtime.errors import UserError
from sandbox.pool import Sandbox
from sandbox.verdict import Result
from weights.checkpoint import latest_run, load

HEAD_S = 10.0  # seconds in which the head of a request must arrive


@dataclass(frozen=True)
class ServeConfig:
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # checkpoint to load: last, or best, of the lowest validation loss
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in
    port: int = 8012  # port to listen on, llama.vim's default; 0 takes a free one
    name: str | None = None  # name of the model; None makes one without "gpt", which Continue takes for a chat model
    api_key: str | None = None  # key that requests must carry: Authorization: Bearer KEY
    origins: str | None = None  # web origins whose pages may use the server, joined by commas; None: only its own page
    hosts: str | None = None  # names that the server is reached by, joined by commas, beside localhost and addresses
    one_line: bool = False  # end completions with their first line, unless a request says otherwise
    max_rows: int = 16  # completions that are decoded at once
    max_waiting: int = 256  # requests that may wait; more are answered 503
    prefix_cache_mb: int = 512  # memory for the keys and values of recent texts, MB
    allow_code_execution: bool = False  # let requests run completions with doctests or assertions, in the sandbox
    device: str | None = None  # cuda, mps or cpu; None takes the best available
    dtype: str = "float32"  # precision of the weights: float32, bfloat16 or float16
    quantize: str | None = None  # store weights in fewer bytes: float16 or int8; faster on a CPU for a few rows

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype={self.dtype}: not one of {', '.join(DTYPES)}")
        if self.quantize not in (None, *QUANTIZATIONS):
            raise UserError(f"--quantize={self.quantize}: not one of {', '.join(QUANTIZATIONS)}")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port={self.port}: must be from 0 to 65535")
        for name in ("max_rows", "max_waiting"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.prefix_cache_mb < 0:
            raise UserError(f"--prefix_cache_mb={self.prefix_cache_mb}: must be 0 or more")
        if self.others_can_use and self.allow_code_execution and self.api_key is None:
            raise UserError(f"--host={self.host} --allow_code_execution: other machines could run code; set --api_key")

    @property
    def others_can_use(self) -> bool:
        return self.host not in ("127.0.0.1", "::1", "localhost")


def serve(config: ServeConfig) -> None:
    """Load the model and answer requests until interrupted. Raises UserError if packages are missing, there is no such
    run, or the port is taken, and OSError if it may run code and the sandbox does not work."""
    try:
        import uvicorn

        from inference.server import Service, make_app
    except ImportError as error:
        raise UserError(f"serve.py needs {error.name}: pip install starlette uvicorn") from None
    if config.allow_code_execution:
        Sandbox(1).close()  # if it does not work here, it says so now
    device = resolve_device(config.device)
    out_dir = config.out_dir or latest_run()

    def ready() -> tuple[GPT, Tokenizer, dict[str, Any]]:
        model, tokenizer, payload = load(out_dir, device, config.checkpoint)
        model.to(DTYPES[config.dtype])
        if device.type == "cpu" or config.quantize is not None:  # a GPU's compiled step would be for one number of rows
            optimize(model, 1, config.quantize)  # one row is the common case; 16 lose a sixth of their speed by it
        return model, tokenizer, payload

    model, tokenizer, payload = in_a_thread(ready)
    limits = {"max_rows": config.max_rows, "max_waiting": config.max_waiting}
    with Batcher(model, tokenizer, **limits, cache_bytes=config.prefix_cache_mb * 10**6) as batcher:
        listed = {name: tuple(filter(None, (getattr(config, name) or "").split(","))) for name in ("origins", "hosts")}
        name = config.name or f"starcoder-style-{re.sub('gpt', '', Path(out_dir).stem, flags=re.I)}"
        settings = {"api_key": config.api_key, "one_line": config.one_line, **listed}
        service = Service(batcher, name, **settings, verify=verify if config.allow_code_execution else None)
        options = {"http": protocol(), "ws": "none", "log_level": "error", "timeout_keep_alive": 30}

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[Any] | None = None) -> None:
                service.stop()  # or it would wait for the end of every completion
                await super().shutdown(sockets)

        server = Server(uvicorn.Config(make_app(service), config.host, config.port, **options))
        server.config.load()
        try:
            socket = server.config.bind_socket()
            socket.listen(server.config.backlog)  # before the address is printed
        except SystemExit:  # it has logged why
            raise UserError(f"--host={config.host} --port={config.port}: cannot listen there; choose others") from None
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"{out_dir}, step {payload['step']}, {model.n_parameters():,} parameters, as {name}", file=sys.stderr)
        print(f"http://{host}:{socket.getsockname()[1]}", flush=True)
        gc.collect()
        gc.freeze()  # a full collection would take 0.1 s, because torch's modules are many objects
        if config.others_can_use and config.api_key is None:
            print("warning: other machines can use this server; set --api_key", file=sys.stderr)
        server.run(sockets=[socket])


def verify(programs: list[str], text: str, doctests: bool) -> list[Result]:
    """Run programs with the assertions `text`, or with the doctests that `text` has."""
    check = doctest_check(text, "verify", "tests") if doctests else text
    with Sandbox(preload=["doctest"]) as sandbox:
        results = dict(sandbox.run_many((program, check, "") for program in programs))
    return [results[index] for index in range(len(programs))]


def protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, with a bound on the time in which the head of a request must arrive."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedHead(H11Protocol):
        head_due: float | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.wait_for_head()
            else:
                self.head_due = None

        def wait_for_head(self) -> None:
            self.head_due = self.head_due or self.loop.time() + HEAD_S
            self.timeout_keep_alive_task = self.loop.call_at(self.head_due, self.timeout_keep_alive_handler)

    return BoundedHead


if __name__ == "__main__":
    run_stage(serve, ServeConfig)
