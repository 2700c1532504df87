"""A cell magic that lets a running serve.py finish the code of a notebook's cell.

    %load_ext inference.notebook

    %%complete --max_tokens=100
    def fib(n):

Running the second cell puts the code, with its completion behind it, in place of the cell. The kernel must find this
project: start Jupyter in its folder, or add the folder to sys.path. `%%complete?` lists the options.
"""

import json
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

TIMEOUT_S = 120.0


@magics_class
class Completion(Magics):
    @magic_arguments()
    @argument("--url", default="http://127.0.0.1:8012", help="address of serve.py")
    @argument("--max_tokens", type=int, default=64, help="tokens to write at most")
    @argument("--temperature", type=float, default=0.2, help="0 takes the likeliest token; up to 2 for more variety")
    @argument("--n", type=int, default=1, help="completions to draw, of which the likeliest is taken")
    @argument("--seed", type=int, help="a number that repeats a completion")
    @argument("--one_line", action="store_true", help="end with the line")
    @argument("--api_key", help="key of the server; {name} stands for a variable of the notebook")
    @cell_magic
    def complete(self, line: str, cell: str) -> None:
        """Continue the cell's text behind its last character, and put both in place of the cell."""
        options = vars(parse_argstring(self.complete, line))
        url, key, n = (options.pop(name) for name in ("url", "api_key", "n"))
        text = cell.removesuffix("\n")  # IPython's
        body = {"prompt": text, "best_of": n, **{name: value for name, value in options.items() if value is not None}}
        self.shell.set_next_input(text + completion(url, key, body), replace=True)


def completion(url: str, key: str | None, body: dict[str, object]) -> str:
    """The first completion that the server at `url` answers. Raises UsageError, which IPython shows as one line."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        request = Request(f"{url.rstrip('/')}/v1/completions", json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=TIMEOUT_S) as response:
                return json.load(response)["choices"][0]["text"]
        except HTTPError as error:
            raise UsageError(f"{url} answers: {json.load(error)['error']['message']}") from None
    except OSError as error:
        raise UsageError(f"{url} does not answer: {error}; start python serve.py, or set --url") from None
    except (HTTPException, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{url} is not the address of serve.py: {error!r}") from None


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Called by %load_ext."""
    shell.register_magics(Completion)
