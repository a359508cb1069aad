"""What a backend of the evaluation must do: the same token ids, log-likelihoods, greedy answers and stops as the model.

Another backend (vLLM, ...) is added to `BACKENDS`, and must pass all of this before `EvaluationCellConfig.backend`
names it. What is expected comes from plain forward passes of the same weights, without the code under test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AddedToken

from smoltulu.tasks.evaluation.kept import ANSWERS_FILE, Kept, Resuming
from smoltulu.tasks.evaluation.lm_eval import wrap
from smoltulu.tasks.models.folders import load_to_write, load_tokenizer
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

TEXTS = ["What is 1 plus 1?", "so so so", "Hello", "The answer is a cat. " * 3]


def _transformers(folder: Path, batch_size: int) -> Any:
    tokenizer = load_tokenizer(folder, TULU_TEMPLATE)
    model = load_to_write(folder, tokenizer, False)
    return wrap(model, tokenizer, batch_size=batch_size, max_length=128, chat=True)


#: Name -> makes what lm-eval asks, from a model folder and a batch size.
BACKENDS: dict[str, Callable[[Path, int], Any]] = {"transformers": _transformers}

pytestmark = pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The model without any backend."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


def asked(*arguments: Any, number: int = 0) -> Any:
    return SimpleNamespace(args=arguments, task_name="task", doc_id=number)


def prompt(backend: Any, text: str) -> str:
    return str(backend.apply_chat_template([{"role": "user", "content": text}]))


def test_token_ids_are_those_of_the_template(make: Callable[[Path, int], Any], folder: Path) -> None:
    """No second bos, nothing after the header of the answer."""
    backend, tokenizer = make(folder, 2), load_tokenizer(folder, TULU_TEMPLATE)
    for text in TEXTS:
        turn = [{"role": "user", "content": text}]
        expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert backend.tok_encode(prompt(backend, text)) == expected


def _loglik(plain: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    import torch

    with torch.inference_mode():
        logits = plain(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].float()
    logps = logits.log_softmax(-1)
    wanted = torch.tensor(continuation)
    return float(logps.gather(1, wanted[:, None]).sum()), bool((logps.argmax(-1) == wanted).all())


def test_log_likelihoods_are_those_of_one_pass_each(make: Callable[[Path, int], Any], folder: Path, plain: Any) -> None:
    backend = make(folder, 3)
    requests = [
        asked(prompt(backend, text), choice, number=number)
        for number, text in enumerate(TEXTS)
        for choice in (" a cat", " three dogs", "4")
    ]
    answers = backend.loglikelihood(requests)
    for request, (value, is_greedy) in zip(requests, answers, strict=True):
        # lm-eval moves white space from the end of a context to the continuation.
        before = request.args[0].rstrip()
        context = backend.tok_encode(before)
        continuation = backend.tok_encode("".join(request.args))[len(context) :]
        expected = _loglik(plain, context, continuation)
        assert value == pytest.approx(expected[0], abs=1e-3) and is_greedy == expected[1]
    # What the model would write itself is greedy.
    first = backend.tok_encode(prompt(backend, TEXTS[0]))
    likeliest = _greedy(plain, first, 1)[0]
    ((_, is_greedy),) = backend._loglikelihood_tokens([(("", ""), first, [likeliest])], disable_tqdm=True)
    assert is_greedy


def _greedy(plain: Any, context: list[int], num_tokens: int) -> list[int]:
    import torch

    ids = list(context)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == plain.generation_config.eos_token_id:
                break
    return ids[len(context) :]


def generate(backend: Any, num_tokens: int, until: list[str]) -> list[Any]:
    settings = {"until": until, "max_gen_toks": num_tokens, "do_sample": False}
    return list(backend.generate_until([asked(prompt(backend, text), dict(settings)) for text in TEXTS]))


def test_answers_are_greedy_and_say_what_ended_them(make: Callable[[Path, int], Any], folder: Path, plain: Any) -> None:
    backend = make(folder, 3)
    for text, answer in zip(TEXTS, generate(backend, 12, []), strict=True):
        ids = _greedy(plain, backend.tok_encode(prompt(backend, text)), 12)
        has_ended = ids[-1] == plain.generation_config.eos_token_id
        assert answer == backend.tok_decode(ids)
        assert (answer.stop, answer.num_tokens) == ("eos" if has_ended else "length", len(ids))


def test_a_stop_string_ends_an_answer(make: Callable[[Path, int], Any], folder: Path) -> None:
    backend = make(folder, 3)
    whole = generate(backend, 12, [])
    stop = str(whole[0])[3:5]
    for before, answer in zip(whole, generate(backend, 12, [stop]), strict=True):
        assert str(answer) == str(before).split(stop)[0]
        assert answer.stop == (stop if stop in before else before.stop)
        assert answer.num_tokens <= before.num_tokens


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_special_token_ends_an_answer_where_it_is_a_stop_string(
    make: Callable[[Path, int], Any], folder: Path, batch_size: int
) -> None:
    """As <|im_end|> does, which many tasks name, of a model whose eos is another. lm-eval's text does not have it."""
    import torch

    def answers(special: bool) -> list[Any]:
        backend = make(folder, batch_size)
        [written, *_] = _greedy(backend.model, backend.tok_encode(prompt(backend, TEXTS[0])), 1)
        backend.tokenizer.add_tokens([AddedToken("<|end|>", special=special, normalized=False)])
        [end] = backend.tok_encode("<|end|>")
        backend.model.resize_token_embeddings(end + 1, mean_resizing=False)
        head = backend.model.lm_head.weight.detach().clone()
        head[end] = 1.5 * head[written]  # so <|end|> is likelier than the likeliest
        backend.model.lm_head.weight = torch.nn.Parameter(head)
        return [(str(one), one.stop, one.num_tokens) for one in generate(backend, 12, ["<|end|>"])]

    assert answers(True)[0][1] == "<|end|>" and answers(True) == answers(False)


def test_a_limit_of_prompt_and_answer_is_that_of_each_batch(make: Callable[[Path, int], Any], folder: Path) -> None:
    """`max_length`, in place of `max_gen_toks`: the longest prompt of all leaves others their room."""
    backend = make(folder, 1)
    lengths = [len(backend.tok_encode(prompt(backend, text))) for text in TEXTS]
    settings = {"until": [], "max_length": max(lengths) + 2, "do_sample": False, "max_gen_toks": 8}
    answers = backend.generate_until([asked(prompt(backend, text), dict(settings)) for text in TEXTS])
    for length, answer in zip(lengths, answers, strict=True):
        assert answer.stop == "eos" or answer.num_tokens == max(lengths) + 2 - length


@pytest.mark.parametrize(
    ("settings", "own", "is_ours"),
    [
        ({"do_sample": False, "temperature": 0.0}, {}, True),
        ({}, {"top_k": 50, "temperature": 0.6, "top_p": 0.9}, True),
        ({"do_sample": True, "temperature": 0.7}, {}, False),
        ({"temperature": 0.7}, {}, False),
        ({"do_sample": False, "num_beams": 2}, {}, False),
        ({"do_sample": False}, {"repetition_penalty": 1.3}, False),
    ],
)
def test_generation_of_greedy_answers_is_ours_and_all_else_is_transformers(
    make: Callable[[Path, int], Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
    own: Any,
    is_ours: bool,
) -> None:
    backend = make(folder, 2)
    monkeypatch.setattr(backend.model, "generation_config", copy.deepcopy(backend.model.generation_config))
    backend.model.generation_config.update(**own)
    calls: list[int] = []
    generate = backend.model.generate
    monkeypatch.setattr(backend.model, "generate", lambda **given: calls.append(1) or generate(**given))
    asked_all = [asked(prompt(backend, text), {"until": [], "max_gen_toks": 4} | settings) for text in TEXTS]
    answers = backend.generate_until(asked_all)
    assert (not calls) == is_ours and backend.batch_size == 2
    assert all(0 < answer.num_tokens <= 4 and answer.stop in ("eos", "length") for answer in answers)


def test_answers_depend_on_neither_the_batch_nor_the_order(make: Callable[[Path, int], Any], folder: Path) -> None:
    alone, together = make(folder, 1), make(folder, 4)
    assert generate(alone, 10, []) == generate(together, 10, [])
    requests = [asked(prompt(alone, text), " a cat", number=number) for number, text in enumerate(TEXTS)]
    values = [value for value, _ in together.loglikelihood(requests)]
    assert [value for value, _ in alone.loglikelihood(requests[::-1])][::-1] == pytest.approx(values, abs=1e-3)


def test_kept_answers_are_not_asked_for_again(make: Callable[[Path, int], Any], folder: Path, tmp_path: Path) -> None:
    backend = make(folder, 1)
    requests = [asked(prompt(backend, TEXTS[number % 4]), " x", number=number) for number in range(20)]
    first = Resuming(backend, Kept(tmp_path, "cpu")).loglikelihood(requests)
    written = generate(Resuming(backend, Kept(tmp_path, "cpu")), 6, [])

    class Silent:
        batch_size = 1
        apply_chat_template = backend.apply_chat_template

    again = Resuming(Silent(), Kept(tmp_path, "cpu"))
    assert again.loglikelihood(requests) == first == backend.loglikelihood(requests)
    for before, after in zip(written, generate(again, 6, []), strict=True):
        assert (before, before.stop, before.num_tokens) == (after, after.stop, after.num_tokens)
    # No other device, version of a library or of ours goes on from them. An older one wrote no number.
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / ANSWERS_FILE).write_bytes(
        (tmp_path / ANSWERS_FILE).read_bytes().replace(b'"answers": 2, ', b"")
    )
    assert len(Kept(tmp_path / "older", "cpu")) == 0
    assert len(Kept(tmp_path, "cuda")) == 0
