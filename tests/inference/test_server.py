"""The HTTP protocols of inference/server.py over real sockets: clients, what editors send, and what nobody should."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from small_server import Answer, Server, eventually, readable_model, serving

import serve
from data.sequences import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, SPECIALS
from data.tokenizer import Special, Tokenizer, load_tokenizer
from inference import server as server_module
from model import GPT
from sandbox.verdict import PASSED, Result

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def plain_tokenizer(shards) -> Tokenizer:
    return load_tokenizer(str(shards.path / "bpe.json"))


@pytest.fixture(scope="module")
def model(plain_tokenizer) -> GPT:
    return readable_model(plain_tokenizer)


@pytest.fixture(scope="module")
def server(model, plain_tokenizer) -> Iterator[Server]:
    """A server whose model has StarCoder's special tokens."""
    with serving(model, plain_tokenizer.with_specials(SPECIALS)) as running:
        yield running


@pytest.fixture(scope="module")
def plain(model, plain_tokenizer) -> Iterator[Server]:
    """A server whose model does not know the middle's tokens."""
    with serving(model, plain_tokenizer) as running:
        yield running


@pytest.fixture
def slow(model, monkeypatch) -> None:
    """Decoding takes 20 ms a step."""
    decode = model.decode

    def slowly(*arguments: Any) -> torch.Tensor:
        time.sleep(0.02)
        return decode(*arguments)

    monkeypatch.setattr(model, "decode", slowly)


def openai_client(server: Server, **options: Any) -> Any:
    openai = pytest.importorskip("openai")
    settings = {"base_url": f"http://127.0.0.1:{server.port}/v1", "api_key": "none", "max_retries": 0, **options}
    return openai.OpenAI(**settings)


def creator(server: Server) -> Callable[..., Any]:
    client = openai_client(server)
    return lambda prompt, **options: client.completions.create(model="any", prompt=prompt, **options)


# OpenAI's own client.


def test_openai_completes_as_the_decoder_does(server):
    create = creator(server)
    answer = create(PROMPT, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.text == server.greedy(PROMPT, 12) and choice.finish_reason == "length"
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "starcoder-style-test", "cmpl-")
    n_prompt = len(server.tokenizer.encode(PROMPT))
    assert answer.usage.model_dump(exclude_none=True) == {
        **{"prompt_tokens": n_prompt, "completion_tokens": 12, "total_tokens": n_prompt + 12}
    }
    assert len(create(PROMPT, temperature=0).choices[0].text) <= len(server.greedy(PROMPT, 16))
    assert create(None, max_tokens=1).choices and create("", max_tokens=1).choices
    assert create(PROMPT, max_tokens=12, top_p=0).choices[0].text == choice.text


def test_openai_gets_several_prompts_and_completions_in_order(server):
    create, prompts = creator(server), ["import os\n", "x = [1, 2", PROMPT]
    answer = create(prompts, max_tokens=8, n=2, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [server.greedy(p, 8) for p in prompts for _ in range(2)]
    ids = [server.tokenizer.encode(prompt) for prompt in prompts]
    assert [c.text for c in create(ids, max_tokens=8, temperature=0).choices] == [server.greedy(p, 8) for p in prompts]
    (echoed,) = create(ids[0], max_tokens=8, temperature=0, echo=True).choices
    assert echoed.text == prompts[0] + server.greedy(prompts[0], 8)


def test_a_seed_repeats_its_text_whatever_else_is_decoded(server):
    create = creator(server)

    def texts(seed: int | None) -> list[str]:
        return [choice.text for choice in create(PROMPT, max_tokens=20, n=3, seed=seed, top_p=0.9).choices]

    alone = texts(7)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(texts, [7, 8, 7, None]))
    assert alone == together[0] == together[2] != together[1]
    assert len(set(alone)) == 3 and texts(None) != texts(None)


def test_stop_strings_end_a_completion_before_them(server):
    create, whole = creator(server), server.greedy(PROMPT, 40)
    stop = whole[9:13]
    assert whole.index(stop) == 9
    for given in (stop, ["\0", stop, whole[20:24]]):
        (choice,) = create(PROMPT, max_tokens=40, temperature=0, stop=given).choices
        assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"


def test_logprobs_are_the_models(server):
    prompt = server.tokenizer.encode(PROMPT)
    (choice,) = creator(server)(PROMPT, max_tokens=10, temperature=0, logprobs=3, echo=True).choices
    found, ids = choice.logprobs, list(prompt)
    for _ in range(10):
        ids.append(int(server.logprobs(ids)[-1].argmax()))
    rows = server.logprobs(ids)
    assert found.tokens == [server.tokenizer.decode([id]) for id in ids] and "".join(found.tokens) == choice.text
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx([float(rows[i, id]) for i, id in enumerate(ids[1:])], abs=1e-4)
    for row, top in zip(rows, found.top_logprobs[1:], strict=False):
        assert list(top.values()) == pytest.approx(row.topk(3).values.flip(0).tolist(), abs=1e-4)
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(ids))]
    # with what follows an echoed prompt of which nothing is completed, evaluation tools score answers
    (choice,) = creator(server)(PROMPT, max_tokens=0, logprobs=1, echo=True).choices
    assert choice.text == PROMPT and len(choice.logprobs.tokens) == len(prompt) and choice.finish_reason == "length"


def test_the_best_of_several_is_the_likeliest_a_token(server):
    create, seeds = creator(server), iter(range(100))
    while True:  # until none ends early: the token that ends a completion counts, but is not reported
        settings = {"max_tokens": 4, "seed": next(seeds), "logprobs": 0}
        drawn = create(PROMPT, n=6, **settings).choices
        if all(choice.finish_reason == "length" for choice in drawn):
            break
    mean = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in drawn}
    best = create(PROMPT, n=2, best_of=6, **settings)
    assert [choice.text for choice in best.choices] == sorted(mean, key=lambda text: -mean[text])[:2]
    assert best.usage.completion_tokens == 24
    assert create(PROMPT, best_of=6, max_tokens=8, seed=3).choices[0].logprobs is None


def test_a_suffix_is_filled_in_before(server, plain):
    openai = pytest.importorskip("openai")
    before, behind = "def f(x):\n    y =", "\n    return y\n"
    pieces = [Special("<|endoftext|>"), FIM_PREFIX, before, FIM_SUFFIX, behind, FIM_MIDDLE]
    wanted = server.greedy(pieces, 10)
    assert creator(server)(before, suffix=behind, max_tokens=10, temperature=0).choices[0].text == wanted
    template = f"<fim_prefix>{before}<fim_suffix>{behind}<fim_middle>"
    assert creator(server)(template, max_tokens=10, temperature=0).choices[0].text == wanted
    with pytest.raises(openai.APIStatusError, match="--fim_rate") as caught:
        creator(plain)(before, suffix=behind)
    assert caught.value.status_code == 501 and caught.value.param == "suffix"
    as_text = creator(plain)(template, max_tokens=10, temperature=0).choices[0].text
    assert as_text == plain.greedy(template, 10)  # a model without the tokens reads their names as text


def test_what_is_far_from_the_cursor_is_left_out_and_the_middle_stays(server):
    """Also of a prompt in which an editor has filled in the template itself, as Continue does."""
    lines = "".join(f"value_{i} = {i}\n" for i in range(400))
    suffixed = creator(server)(lines, suffix=lines, max_tokens=10, temperature=0)
    assert 246 - 256 // 8 < suffixed.usage.prompt_tokens <= 246
    filled = creator(server)(f"<fim_prefix>{lines}<fim_suffix>{lines}<fim_middle>", max_tokens=10, temperature=0)
    assert filled.choices[0].text == suffixed.choices[0].text
    cut = creator(server)(lines, max_tokens=10, temperature=0)
    assert 246 - 256 // 8 < cut.usage.prompt_tokens <= 246
    end = server.tokenizer.decode(server.tokenizer.encode(lines)[-cut.usage.prompt_tokens :])
    assert cut.choices[0].text == server.greedy(end, 10)


@pytest.mark.parametrize("suffix", [None, "\nreturn 1\n"])
def test_while_one_types_behind_a_long_text_little_of_it_is_read_again(server, suffix):
    before = "".join(f"value_{i} = {i}\n" for i in range(400))
    read, typed = server.metric("prompt_tokens_read_total"), "total = value_1 + value_2"
    for n in range(len(typed)):
        creator(server)(before + typed[:n], suffix=suffix, max_tokens=4, temperature=0)
    assert server.metric("prompt_tokens_read_total") - read < 3 * 246  # of 25 times about 230


def test_other_files_get_the_room_that_is_left(server):
    other = [{"filename": "a.py", "text": "".join(f"name_{i} = {i}\n" for i in range(300))}]
    asked = {"input_prefix": "import a\n", "prompt": "a.", "input_suffix": "\n", "n_predict": 8, "input_extra": other}
    assert 200 < server.ask("/infill", asked).json["tokens_evaluated"] <= 248


def test_a_stream_brings_the_same_text_and_its_usage(server):
    create, settings = creator(server), {"max_tokens": 20, "seed": 5, "n": 2, "logprobs": 1, "echo": True}
    whole = create([PROMPT, "x = ["], **settings)
    texts, tokens, finishes, last = [""] * 4, [[], [], [], []], [None] * 4, None
    for last in create([PROMPT, "x = ["], stream=True, stream_options={"include_usage": True}, **settings):
        for choice in last.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            finishes[choice.index] = finishes[choice.index] or choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert last.usage == whole.usage and not last.choices
    assert all(chunk.usage is None for chunk in create(PROMPT, stream=True))


def test_the_list_of_models_says_what_is_served(server):
    pytest.importorskip("openai")
    client = openai_client(server)
    (model,) = client.models.list().data
    assert model.id == "starcoder-style-test" and model.object == "model" and "gpt" not in model.id
    assert client.models.retrieve(model.id).id == model.id


def test_mistakes_raise_openais_errors(server, model, plain_tokenizer, slow):
    openai = pytest.importorskip("openai")
    create = creator(server)
    cases = [
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 99}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"temperature": 9}, "temperature"),
        ({"extra_body": {"stop": 5}}, "stop"),
        ({"extra_body": {"stream_options": [1]}, "stream": True}, "stream_options"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ]
    for wrong, param in cases:
        with pytest.raises(openai.BadRequestError, match=param) as caught:
            create(PROMPT, **wrong)
        assert caught.value.param == param and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="no model other"):
        openai_client(server).models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        openai_client(server).chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.APIStatusError, match="bytes") as caught:
        create("x" * 10_000_000)
    assert caught.value.status_code == 413
    with serving(model, plain_tokenizer, 1, 1, api_key="schlüssel") as guarded:
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer") as caught:
            openai_client(guarded, api_key="other").models.list()
        assert caught.value.code == "invalid_api_key"
        assert guarded.ask("/v1/models", Authorization="Bearer schlüssel".encode().decode("latin-1")).status == 200
        assert guarded.ask("/health").status == guarded.ask("/").status == 200 and guarded.ask("/metrics").status == 401
    with serving(model, plain_tokenizer, 1, 1) as full, ThreadPoolExecutor(8) as pool:

        def status(number: int) -> int:
            answer = full.ask("/v1/completions", {"prompt": "x", "max_tokens": 20, "temperature": 0})
            assert answer.status == 200 or answer.headers["Retry-After"]
            return answer.status

        assert set(pool.map(status, range(8))) == {200, 503}


# What editors send, byte for byte.


def posted(path: str, body: str, *headers: str) -> bytes:
    data = body.encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1:8012", *headers, f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


CURL = ("User-Agent: curl/8.14.1", "Accept: */*", "Content-Type: application/json")
AXIOS = (
    *("Accept: application/json, text/plain, */*", "Content-Type: application/json", "User-Agent: axios/1.11.0"),
    *("Accept-Encoding: gzip, compress, deflate, br", "Connection: keep-alive"),
)
BEFORE, LINE, BEHIND = "import os\n\ndef f(x):\n", "    y = ", "\n    return y\n"
LLAMA_VIM = (
    '{"id_slot":0,"input_prefix":"import os\\n\\ndef f(x):\\n","input_suffix":"\\n    return y\\n","input_extra":'
    '[{"text":"def g():\\n    pass\\n","time":[1765,1234],"filename":"g.py"}],"prompt":"    y = ","n_predict":128,'
    '"stop":[],"n_indent":4,"top_k":40,"top_p":0.9,"samplers":["top_k","top_p","infill"],"stream":false,"cache_prompt":true,'
    '"t_max_prompt_ms":500,"t_max_predict_ms":1000,"response_fields":["content","timings/prompt_n","timings/prompt_ms",'
    '"timings/prompt_per_token_ms","timings/prompt_per_second","timings/predicted_n","timings/predicted_ms",'
    '"timings/predicted_per_token_ms","timings/predicted_per_second","truncated","tokens_cached"]}'
)
LLAMA_VIM_WARM_UP = (
    '{"id_slot":0,"input_prefix":"","input_suffix":"","input_extra":[{"text":"def g():\\n    pass\\n","time":[1765,'
    '1234],"filename":"g.py"}],"prompt":"","n_predict":0,"temperature":0.0,"samplers":[],"stream":false,"cache_prompt":true,'
    '"t_max_prompt_ms":1,"t_max_predict_ms":1,"response_fields":[""]}'
)


def test_llama_vim_gets_flat_fields_without_spaces(server):
    answer = server.send(posted("/infill", LLAMA_VIM, *CURL))
    found = answer.json
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
    assert answer.body.startswith(b'{"content":"'), "llama.vim looks for this before it decodes"
    asked = json.loads(LLAMA_VIM)["response_fields"]
    assert set(found) <= set(asked) and {"content", "truncated", "tokens_cached"} <= set(found)
    # it shows these together, or none of them
    shown = {f"timings/{a}_{b}" for a in ("prompt", "predicted") for b in ("n", "ms", "per_second")}
    assert shown <= set(found) and all(isinstance(found[name], (int, float)) for name in shown)
    lines = found["content"].split("\n")[1:]
    assert all(line.startswith("    ") for line in lines if line.strip()), "n_indent"
    warm = server.send(posted("/infill", LLAMA_VIM_WARM_UP, *CURL))
    assert warm.status == 200


def test_infill_is_what_the_decoder_fills_in_behind_the_other_files(server):
    body = {**json.loads(LLAMA_VIM), "temperature": 0, "n_predict": 12, "n_indent": 0, "t_max_predict_ms": 60_000}
    body |= {"response_fields": None}
    found = server.ask("/infill", body).json
    other = [Special("<|endoftext|>"), Special("<filename>"), "g.py", "\n", "def g():\n    pass\n"]
    pieces = [*other, Special("<|endoftext|>"), FIM_PREFIX, BEFORE + LINE, FIM_SUFFIX, BEHIND, FIM_MIDDLE]
    n_prompt = len(server.tokenizer.encode_pieces(pieces))
    assert found["content"] == server.greedy(pieces, 12) and found["tokens_evaluated"] == n_prompt
    assert found["timings"]["prompt_n"] + found["timings"]["cache_n"] == n_prompt
    assert server.ask("/infill", body).json["timings"]["prompt_n"] == 1, "the prompt was known"
    chunks = server.ask("/infill", {**body, "stream": True}).body.decode().split("\n\n")
    parts = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks if chunk]
    assert "".join(part["content"] for part in parts) == found["content"]
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]


def test_llama_vscode_warms_up_and_asks_for_several(server):
    template = (
        '{"input_prefix":"import os\\n","input_suffix":"\\n","input_extra":[{"text":"a = 1\\n","time":1765.5,'
        '"filename":"a.py"}],"prompt":"x = ","n_predict":%s,"samplers":["top_k","top_p","infill"],"cache_prompt":true,'
        '"t_max_prompt_ms":500,"t_max_predict_ms":%s%s}'
    )
    drawn = server.metric("tokens_drawn_total")
    warm = server.send(posted("/infill", template % (0, 1, ""), *AXIOS))
    assert warm.status == 200 and warm.json["content"] == "" and warm.json["tokens_predicted"] == 0
    assert server.metric("tokens_drawn_total") <= drawn + 1
    several = server.send(posted("/infill", template % (16, 2500, ',"n_cmpl":3,"top_k":40,"top_p":0.99'), *AXIOS))
    assert len(several.json) == 3 and all(one["tokens_predicted"] >= 1 for one in several.json)


def test_time_ends_a_completion(server, slow):
    answer = server.ask("/infill", {"prompt": "x = ", "n_predict": 200, "t_max_predict_ms": 200})
    assert answer.status == 200 and answer.json["tokens_predicted"] < 30


def test_continue_streams_a_filled_in_template(server):
    stops = '["<fim_prefix>","<fim_suffix>","<fim_middle>","<file_sep>","<|endoftext|>","</fim_middle>","</code>",'
    body = (
        '{"prompt":"<fim_prefix>import os\\n\\ndef f(x):\\n    y = <fim_suffix>\\n    return y\\n<fim_middle>","model":'
        f'"starcoder-style-test","max_tokens":64,"temperature":0.01,"stop":{stops}"/src/","#- coding: utf-8","```"],'
        '"stream":true}'
    )
    headers = ("Content-Type: application/json", "Accept: */*", "Authorization: Bearer ", "x-api-key: ", "api-key: ")
    answer = server.send(posted("/v1/completions", body, *headers))
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
    events = answer.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2])
    pieces = [Special("<|endoftext|>"), FIM_PREFIX, BEFORE + LINE, FIM_SUFFIX, BEHIND, FIM_MIDDLE]
    assert text[:16] == server.greedy(pieces, 64)[:16]  # later the two likeliest may be too close for a 0.01


def llm_ls_error(body: bytes) -> str:
    """What llm-ls 0.5 reads of an answer that has no choices. It fails on any other shape."""
    found = json.loads(body)
    assert "choices" not in found
    (detail,) = found["detail"]
    assert isinstance(detail["loc"], str) or type(detail["loc"]) is int
    assert isinstance(detail["type"], str)
    return detail["msg"]


def test_llm_nvim_nests_its_settings_and_reads_errors_only_as_detail(server, plain):
    prompt = "<fim_prefix>import os\\n\\ndef f(x):\\n    y = <fim_suffix>\\n    return y\\n<fim_middle>"
    template = (
        f'{{"model":"bigcode/starcoder2-15b","parameters":{{"max_new_tokens":%s,"temperature":%s,"top_p":0.95}},"prompt":'
        f'"{prompt}","stream":false}}'
    )
    headers = ("authorization: Bearer hf_x", "user-agent: llm-ls/0.5.3; rust/unknown; ide/Neovim", "accept: */*")
    headers = ("content-type: application/json", *headers)
    answer = server.send(posted("/v1/completions", template % (24, 0), *headers))
    pieces = [Special("<|endoftext|>"), FIM_PREFIX, BEFORE + LINE, FIM_SUFFIX, BEHIND, FIM_MIDDLE]
    assert [choice["text"] for choice in answer.json["choices"]] == [server.greedy(pieces, 24)]
    wrong = server.send(posted("/v1/completions", template % (-5, 0), *headers))
    assert wrong.status == 400 and "max_new_tokens" in llm_ls_error(wrong.body)
    wrong = server.send(posted("/v1/completions", template % (5, 7), *headers))
    assert wrong.status == 400 and "temperature" in llm_ls_error(wrong.body)
    for body, path in ((b"{", "/v1/completions"), (b"{}", "/v2/completions")):
        assert llm_ls_error(server.ask(path, body).body)


def test_mistral_clients_fill_in_the_middle(server, plain):
    body = {"model": "codestral-latest", "prompt": BEFORE + LINE, "suffix": BEHIND, "max_tokens": 12, "temperature": 0}
    body |= {"random_seed": 5, "stop": [], "stream": False}
    pieces = [Special("<|endoftext|>"), FIM_PREFIX, BEFORE + LINE, FIM_SUFFIX, BEHIND, FIM_MIDDLE]
    answer = server.ask("/v1/fim/completions", body, Authorization="Bearer x")
    (choice,) = answer.json["choices"]
    assert choice["message"] == {"role": "assistant", "content": server.greedy(pieces, 12)}
    assert answer.json["object"] == "chat.completion" and answer.json["usage"]["completion_tokens"] == 12
    events = server.ask("/v1/fim/completions", {**body, "stream": True}).body.decode().split("\n\n")
    deltas = [choice["delta"]["content"] for event in events[:-2] for choice in json.loads(event[6:])["choices"]]
    assert events[-2] == "data: [DONE]" and "".join(deltas) == choice["message"]["content"]
    assert plain.ask("/v1/fim/completions", body).status == 501


def test_a_model_without_the_middles_tokens_says_so_to_editors(plain):
    for body in (LLAMA_VIM, LLAMA_VIM_WARM_UP):
        answer = plain.send(posted("/infill", body, *CURL))
        assert answer.status == 501 and "prepare.py --fim_rate" in answer.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_decoded_no_further(server, slow, stream):
    drawn = server.metric("tokens_drawn_total")
    body = json.dumps({"prompt": "x = ", "suffix": "\n", "n": 4, "max_tokens": 128, "temperature": 0, "stream": stream})
    with server.opened(posted("/v1/completions", body, *CURL)):
        assert eventually(lambda: server.metric("completions_running") == 4)
    assert eventually(lambda: server.metric("completions_running") == 0)
    assert 4 <= server.metric("tokens_drawn_total") - drawn < 4 * 100


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_not_decoded(model, plain_tokenizer, slow, stream):
    with serving(model, plain_tokenizer, 1) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.ask, "/v1/completions", {"prompt": "x", "max_tokens": 60, "temperature": 0})
        assert eventually(lambda: server.metric("completions_running") == 1)
        read = server.metric("prompt_tokens_read_total")
        body = json.dumps({"prompt": "import os, sys, re, json, html, http", "max_tokens": 128, "stream": stream})
        with server.opened(posted("/v1/completions", body, *CURL)):
            assert eventually(lambda: server.metric("requests_waiting") == 1)
        assert long.result().status == 200
        assert eventually(lambda: server.metric("requests_waiting") == 0)
        time.sleep(0.1)
        assert server.metric("prompt_tokens_read_total") == read and server.metric("completions_running") == 0


# What nobody should send.

ENDPOINTS = ("/v1/completions", "/v1/fim/completions", "/infill")
HUGE, HUNDRED = "1" + "0" * 400, json.dumps(["x"] * 100)
NUMBER = ('"1"', "true", "[]", "{}", "1e400", "-1e400", HUGE, f"-{HUGE}")
WRONG = {
    "number": (*NUMBER, "-0.5"),
    "ms": (*NUMBER, "-2"),
    "integer": (*NUMBER, "1.5"),
    "flag": ('"true"', "0", "1", "[]", "{}"),
    "text": ("5", "0", "true", "false", "[]", "{}"),
    "texts": ("5", "true", "{}", "[5]", "[null]", "[[]]", HUNDRED, json.dumps("x" * 10_000)),
    "object": ("5", "true", "[1]", '"x"'),
    "prompt": ("5", "true", "{}", "[]", "[null]", "[[]]", "[-1]", "[99999]", "[1.0]", "[true]", '["a",5]', HUNDRED),
    "extra": ("5", '"x"', "{}", "[5]", '[{"text":5}]', '[{"filename":[]}]', json.dumps([{}] * 1000)),
}
COMMON = {"temperature": "number", "top_p": "number", "top_k": "integer", "stream": "flag", "one_line": "flag"}
COMMON |= {"stop": "texts"}
OPENAI = {"prompt": "prompt", "suffix": "text", "max_tokens": "integer", "n": "integer", "best_of": "integer"}
OPENAI |= {"logprobs": "integer", "echo": "flag", **COMMON}
INFILL = {"prompt": "text", "input_prefix": "text", "input_suffix": "text", "input_extra": "extra"}
INFILL |= dict.fromkeys(("id_slot", "n_predict", "n_indent", "n_cmpl", "seed"), "integer")
INFILL |= {"t_max_predict_ms": "ms", "response_fields": "texts", **COMMON}
FIELDS = {
    "/v1/completions": {**OPENAI, "seed": "integer", "parameters": "object"},
    "/v1/fim/completions": {**OPENAI, "random_seed": "integer"},
    "/infill": INFILL,
}


def assert_refused(answer: Answer, *statuses: int) -> None:
    assert answer.status in (statuses or (400,)), answer
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and llm_ls_error(answer.body) == error["message"]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_has_its_type_and_bounds(server, path):
    for name, kind in FIELDS[path].items():
        for value in WRONG[kind]:
            body = f'{{"prompt":"x","max_tokens":1,"n_predict":1,"{name}":{value}}}'
            answer = server.ask(path, body.encode())
            assert answer.status == 400, (body[:200], answer)
            assert_refused(answer)
    assert server.ask(path, {"prompt": "x", **dict.fromkeys(FIELDS[path])}).status == 200  # null is absent


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_not_json_is_refused(server, path):
    bodies = [b"", b" ", b"{", b"nul", b"null", b"5", b'"x"', b"[]", b"\xff\xfe{\x00}\x00"]
    bodies += [b'{"prompt":NaN}', b'{"temperature":Infinity}', b'{"temperature":-Infinity}']
    bodies += [b'{"prompt":"\xff"}', b'{"prompt":"\xed\xa0\x80"}']
    bodies += [b'{"prompt":"\\ud800"}', b'{"prompt":["\\udfff"]}', b'{"\\ud800":1}', b'{"stop":["\\ud83d"]}']
    bodies += [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"[" * 400_000 + b"]" * 400_000 + b"}"]
    bodies += [b'{"prompt":%s}' % (b"9" * 5000), b"\x00" * 1000, b'{"prompt":"x"}{"prompt":"x"}']
    for body in bodies:
        assert_refused(server.ask(path, body))
    for body in (b"x" * 10_000_000, b'{"prompt":"' + b"x" * 10_000_000 + b'"}'):
        assert_refused(server.ask(path, body), 413)
    assert server.ask("/health").json == {"status": "ok"}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_prompts_of_a_megabyte_are_cut_not_choked_on(server, path):
    name = "input_suffix" if path == "/infill" else "suffix"
    texts = (" " * 1_000_000, "a" * 1_000_000, "\n" * 500_000, "é" * 150_000, "\0" * 150_000, "<fim_prefix>" * 80_000)
    for text in texts:
        for start in ("", "<fim_prefix>", "<fim_prefix>x<fim_suffix>"):
            body = {"prompt": start + text, "max_tokens": 1, "n_predict": 1}
            assert server.ask(path, body).status == 200, (start, text[:5])
            assert server.ask(path, {**body, "prompt": start, name: text}).status == 200
    extra = [{"filename": " " * 1_000_000, "text": "x"}]
    assert server.ask("/infill", {"input_extra": extra, "n_predict": 1}).status == 200


def test_broken_http_does_no_harm(server, monkeypatch):
    monkeypatch.setattr(serve, "HEAD_S", 0.3)
    monkeypatch.setattr(server_module, "BODY_S", 0.3)
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    for head in (b"Content-Length: -5", b"Content-Length: x", b"Content-Length: 5\r\nContent-Length: 6", b"\0: x"):
        assert server.send(start + head + b"\r\n\r\n{}").status == 400
    for broken in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n", b"x" * 70_000):
        assert server.send(broken).status == 400
    assert server.send(start + b"Content-Length: 3\r\n\r\n{}").status == 408  # the third byte never comes
    assert server.send(start + b"Content-Length: 1\r\n\r\n{}").status == 400
    assert server.send(start + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n").status == 200
    with server.opened(start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n") as connection:
        connection.recv(1000)
    for slow in (b"", b"GET /health HT"):
        with server.opened(slow) as connection:
            assert connection.recv(1000) == b"", "closed"
    with server.opened(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        while not connection.recv(1000).endswith(b'{"status":"ok"}'):
            pass
        connection.sendall(b"GET /hea")
        assert connection.recv(1000) == b""
    assert server.ask("/health").status == 200


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(server):
    for path in ("/v1/nothing", "/v1/chat/completions", "/%ff%00", "/v1/models/%2e%2e/x", "//"):
        assert_refused(server.ask(path, {} if "models" not in path else None), 404)
    for path, method in (("/v1/completions", "GET"), ("/infill", "PUT"), ("/health", "DELETE"), ("/v1/models", "POST")):
        answer = server.ask(path, method=method)
        assert_refused(answer, 405)
    assert server.ask("/health", method="HEAD").status == 200


def test_pages_of_other_sites_are_kept_out(server, model, plain_tokenizer):
    for host in ("evil.example", "evil.example:8012", "localhost.evil.example", "127.0.0.1.evil.example", "", "x@y"):
        assert_refused(server.ask("/v1/models", Host=host), 421)
    for host in ("localhost", "LOCALHOST:8012", "127.0.0.1", "[::1]:8012", "192.168.0.7:8012"):
        assert server.ask("/v1/models", Host=host).status == 200
    assert "Access-Control-Allow-Origin" not in server.ask("/v1/models", Origin="http://localhost:3000").headers
    named = {"origins": ("http://localhost:3000",), "hosts": ("workstation",), "api_key": "key"}
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    with serving(model, plain_tokenizer, **named) as open_to_one:
        for origin, allowed in (("http://localhost:3000", "http://localhost:3000"), ("http://evil.example", None)):
            answer = open_to_one.ask("/v1/models", Origin=origin, Authorization="Bearer key", Host="workstation:80")
            assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == allowed
            answer = open_to_one.ask("/v1/completions", method="OPTIONS", Origin=origin, **asks)
            assert answer.headers["Access-Control-Allow-Origin"] == allowed
            assert answer.status == (200 if allowed else 400)
            refused = open_to_one.ask("/v1/completions", {}, Origin=origin)  # a page must be able to read why
            assert refused.status == (401 if allowed else 403)
            assert refused.headers["Access-Control-Allow-Origin"] == allowed
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Host": f"127.0.0.1:{server.port}"}
    assert server.ask("/v1/completions", {"prompt": "x"}, **own).status == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000"):  # sent without asking first, as text/plain
        answer = server.ask("/v1/completions", {"prompt": "x"}, Origin=origin, Content_Type="text/plain")
        assert_refused(answer, 403)


# The decoder's text, whatever else is decoded.


def test_greedy_texts_are_the_decoders_under_concurrency(server):
    words = [f"value_{i} = compute({i}, {i % 7})\n" for i in range(40)]
    prompts = ["".join(words[i % 5 : i % 5 + 1 + i % 9]) + f"result_{i} =" for i in range(24)]
    sizes = [5 + 7 * (i % 6) for i in range(24)]

    def text(i: int) -> str:
        body = {"prompt": prompts[i], "max_tokens": sizes[i], "temperature": 0, "stream": i % 2 == 0}
        answer = server.ask("/v1/completions", body)
        if i % 2:
            return answer.json["choices"][0]["text"]
        events = answer.body.decode().split("\n\n")[:-2]
        return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)

    with ThreadPoolExecutor(12) as pool:
        other = {"prompt": "x", "n": 3, "max_tokens": 30}
        noise = [pool.submit(server.ask, "/v1/completions", other) for _ in range(6)]
        texts = list(pool.map(text, range(24)))
    assert texts == [server.greedy(prompt, size) for prompt, size in zip(prompts, sizes, strict=True)]
    assert all(one.result().status == 200 for one in noise)


def test_one_line_ends_with_the_line(model, plain_tokenizer):
    with serving(model, plain_tokenizer, one_line=True) as server:
        body = {"prompt": PROMPT, "max_tokens": 200, "n": 5, "seed": 0}
        choices = server.ask("/v1/completions", body).json["choices"]
        assert all("\n" not in choice["text"].lstrip() for choice in choices)
        body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0, "one_line": False}
        assert server.ask("/v1/completions", body).json["choices"][0]["text"] == server.greedy(PROMPT, 100)


# Completions that are run.


def test_code_is_not_run_unless_allowed(server):
    for body in ({"verify": "doctest"}, {"tests": "assert True"}):
        assert_refused(server.ask("/v1/completions", {"prompt": PROMPT, **body}), 403)


def test_the_first_completion_that_passes_is_answered(model, plain_tokenizer):
    """The completions are nonsense, in comments."""
    with serving(model, plain_tokenizer, verify=serve.verify) as server:
        programs = {"prompt": "x = 1\n#", "max_tokens": 6, "n": 4, "seed": 1, "stop": ["\n"]}
        passed = server.ask("/v1/completions", {**programs, "tests": "assert x == 1"}).json
        assert passed["verdict"]["passed"] == passed["verdict"]["of"] == 4 and len(passed["choices"]) == 1
        plain_choices = server.ask("/v1/completions", programs).json["choices"]
        assert passed["choices"][0]["text"] == plain_choices[0]["text"]
        failed = server.ask("/v1/completions", {**programs, "tests": "assert x == 2"}).json
        assert failed["verdict"]["passed"] == 0 and failed["choices"] == [] and failed["verdict"]["outcome"] != "passed"
        doctested = {**programs, "prompt": '"""\n>>> 1 + 1\n2\n"""\n#', "verify": "doctest"}
        assert server.ask("/v1/completions", doctested).json["verdict"]["passed"] == 4
        assert_refused(server.ask("/v1/completions", {**programs, "verify": "doctest"}))  # it has none
        for wrong in ({"verify": "nose"}, {"verify": 5}, {"tests": 5}, {"tests": "x", "stream": True}):
            assert_refused(server.ask("/v1/completions", {**programs, **wrong}))
        assert_refused(server.ask("/v1/completions", {**programs, "tests": "x", "prompt": ["a", "b"]}))


def test_programs_that_run_long_do_not_stop_completions(model, plain_tokenizer):
    release = threading.Event()

    def long(programs: list[str], text: str, doctests: bool) -> list[Any]:
        release.wait(30)
        return [Result(PASSED)] * len(programs)

    with serving(model, plain_tokenizer, verify=long) as server, ThreadPoolExecutor(40) as pool:
        body = {"prompt": "x = 1\n#", "max_tokens": 2, "tests": "assert x"}
        running = [pool.submit(server.ask, "/v1/completions", body) for _ in range(40)]
        try:
            assert eventually(lambda: server.metric("tokens_drawn_total") >= 40)
            assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 2}).status == 200
        finally:
            release.set()
        assert all(one.result().json["verdict"]["passed"] == 1 for one in running)
