"""Scripts written for nano-vLLM or vLLM run here with another import."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engines.fused
import engines.nano
from engines.base import InputError
from engines.nano.utils.detokenize import TextStream
from tests.engines import reference

LLMS = [engines.nano, engines.fused]
UMLAUTS = "Größe 5 €, 大きさ 😀 "
TEXTS = ["The engine keeps ", "A block belongs to one sequence "]


@pytest.mark.parametrize("package", LLMS)
def test_nano_vllm_script(package):
    llm = package.LLM(str(reference.TINY), enforce_eager=True, tensor_parallel_size=1, max_model_len=256)
    outputs = llm.generate(TEXTS, package.SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    want = reference.greedy([list(text.encode()) for text in TEXTS], 12)
    assert [output["token_ids"] for output in outputs] == want
    assert [output["text"] for output in outputs] == [bytes(tokens).decode() for tokens in want]


@pytest.mark.parametrize("package", LLMS)
def test_vllm_script(package):
    llm = package.LLM(model=str(reference.TINY), dtype="float32", seed=0, gpu_memory_utilization=0.5)
    prompts = [{"prompt_token_ids": list(text.encode())} for text in TEXTS]
    settings = [package.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (3, 8)]
    outputs = llm.generate(prompts, settings)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 8]
    assert outputs[1].prompt_token_ids == list(TEXTS[1].encode())
    assert outputs[0].outputs[0].finish_reason == "length"


def test_one_prompt_and_default_settings():
    (output,) = engines.nano.LLM(reference.TINY, max_model_len=128).generate("The block ", use_tqdm=False)
    assert output.prompt == "The block " and len(output["token_ids"]) <= 64


def test_unknown_keyword_names_the_nearest():
    with pytest.raises(InputError, match="did you mean enforce_eager"):
        engines.nano.LLM(reference.TINY, enforce_eagre=True)


def test_prompt_longer_than_the_model():
    llm = engines.nano.LLM(reference.TINY, max_model_len=32)
    with pytest.raises(InputError, match="prompt of 32 tokens.*longest that fits is 31"):
        llm.generate([[1] * 32], use_tqdm=False)
    with pytest.raises(InputError, match="outside the vocabulary"):
        llm.generate([[1, 260]], use_tqdm=False)
    with pytest.raises(InputError, match="model takes"):
        engines.nano.LLM(reference.TINY, max_model_len=100_000)


@pytest.mark.parametrize("package", LLMS)
@pytest.mark.parametrize("token_id", [-1, 260, 2**31, 2**32 + 1, 2**63, 2**64 + 1, -(2**63), -(2**70)])
def test_a_token_outside_the_vocabulary(package, token_id):
    """Whatever a number of 32 or 64 bits would make of it, anywhere in the prompt; nothing is queued."""
    llm = package.LLM(reference.TINY, max_model_len=32)
    for prompt in ([token_id], [5, token_id, 5]):
        with pytest.raises(InputError, match="request 0 has token ids outside the vocabulary of 260"):
            llm.add(reference.requests([prompt], 2)[0])
    assert not llm.has_unfinished()


def test_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        engines.nano.LLM(tmp_path)


def test_a_refused_request_leaves_nothing_behind():
    llm = engines.nano.LLM(reference.TINY, max_model_len=32)
    greedy = engines.nano.SamplingParams(temperature=0.0, max_tokens=4)
    for call in (lambda p: llm.generate(p, greedy, use_tqdm=False), lambda p: list(llm.stream(p, greedy))):
        with pytest.raises(InputError, match="prompt of 32 tokens"):
            call([[1] * 5, [1] * 32])
        assert not llm.has_unfinished()
    prompt = list(TEXTS[0].encode())
    assert llm.generate([prompt], greedy, use_tqdm=False)[0]["token_ids"] == reference.greedy([prompt], 4)[0]


@pytest.mark.parametrize("package", LLMS)
def test_stream(package):
    llm = package.LLM(reference.TINY, max_model_len=256)
    limits = (12, 5)
    settings = [package.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in limits]
    want = [reference.greedy([list(text.encode())], n)[0] for text, n in zip(TEXTS, limits, strict=True)]
    tokens, texts = [[], []], ["", ""]
    for output in llm.stream(TEXTS, settings):
        at = output.prompt_index
        tokens[at].append(output.token_id)
        texts[at] += output.delta
        (so_far,) = output.outputs
        assert (so_far.token_ids, so_far.text, output["text"]) == (tokens[at], texts[at], texts[at])
        assert (output.prompt, output.prompt_token_ids) == (TEXTS[at], list(TEXTS[at].encode()))
        last = len(tokens[at]) == limits[at]
        assert (output.finished, so_far.finish_reason) == ((True, "length") if last else (False, None))
        # No token waits for another request's: those of a step come before those of the next.
        assert len(tokens[1]) in (min(5, len(tokens[0])), min(5, len(tokens[0]) - 1))
    assert tokens == want
    assert texts == [bytes(ids).decode() for ids in want]


def test_stream_ends_at_a_stop_token():
    llm = engines.nano.LLM(reference.TINY, max_model_len=256)
    want = reference.greedy([list(TEXTS[0].encode())], 12)[0]
    stop = next(token for at, token in enumerate(want) if at and token not in want[:at])
    outputs = list(llm.stream(TEXTS[0], engines.nano.SamplingParams(temperature=0.0, stop_token_ids=(stop,))))
    assert [output.token_id for output in outputs] == want[: want.index(stop) + 1]
    assert [output.outputs[0].finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["stop"]


@pytest.mark.parametrize("package", LLMS)
@pytest.mark.parametrize("seen", [0, 1, 4])
def test_a_stream_that_is_left_frees_its_cache(package, seen):
    llm = package.LLM(reference.TINY, max_model_len=256, max_num_seqs=1, kvcache_block_size=16)
    stream = llm.stream(TEXTS, package.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    for _ in range(seen):
        next(stream)
    blocks = llm.scheduler.blocks
    assert (len(blocks.free) < blocks.num_blocks) == llm.has_unfinished() == (seen > 0)
    stream.close()
    assert len(blocks.free) == blocks.num_blocks and not any(blocks.ref_counts)
    assert not llm.has_unfinished()


def test_streams_and_a_batch_share_an_engine():
    llm = engines.nano.LLM(reference.TINY, max_model_len=256)
    greedy = engines.nano.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    want = reference.greedy([list(text.encode()) for text in TEXTS], 8)
    one, both = llm.stream(TEXTS[0], greedy), llm.stream(TEXTS, greedy)
    outputs = [next(one), next(both), next(both)]
    assert [output.prompt_index for output in outputs] == [0, 0, 1]
    assert [output["token_ids"] for output in llm.generate(TEXTS, greedy, use_tqdm=False)] == want
    rest = {0: [], 1: []}  # what the batch's steps drew for the streams meanwhile comes now
    for output in both:
        rest[output.prompt_index].append(output.token_id)
        assert output.finished == (len(output["token_ids"]) == 8)
    assert [[outputs[1].token_id, *rest[0]], [outputs[2].token_id, *rest[1]]] == want
    assert [outputs[0].token_id, *(output.token_id for output in one)] == want[0]


# Request 1 is aborted after its own third token; between a step of both and its turn; there, with its last token drawn.
@pytest.mark.parametrize(("turn", "given"), [(1, 3), (0, 3), (0, 7)])
def test_nothing_comes_of_an_aborted_request_of_a_stream(turn, given):
    llm = engines.nano.LLM(reference.TINY, max_model_len=256)
    tokens, ids = [[], []], {}
    settings = [engines.nano.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (12, 8)]
    for output in llm.stream(TEXTS, settings):
        tokens[output.prompt_index].append(output.token_id)
        ids[output.prompt_index] = output.request_id
        if output.prompt_index == turn and len(tokens[1]) == given:
            llm.abort([ids[1]])
    want = reference.greedy([list(text.encode()) for text in TEXTS], 12)
    assert tokens == [want[0], want[1][:given]]


def test_stream_of_noise():
    """Hot enough, the model speaks random bytes: cut characters, also at the end."""
    llm = engines.nano.LLM(reference.TINY, max_model_len=256)
    settings = [engines.nano.SamplingParams(temperature=100.0, max_tokens=n, ignore_eos=True) for n in range(10, 30)]
    deltas = [""] * len(settings)
    for output in llm.stream([TEXTS[0]] * len(settings), settings):
        deltas[output.prompt_index] += output.delta
        if output.finished:
            assert deltas[output.prompt_index] == output["text"] == llm._text(output["token_ids"])
    assert any(text.endswith("\ufffd") for text in deltas)


@pytest.fixture(scope="module")
def decode():
    return engines.nano.LLM(reference.TINY, max_model_len=32)._text


def test_deltas_are_whole_characters(decode):
    """A token is a byte here: a character comes with its last one."""
    stream = TextStream(decode)
    want = [part for character in UMLAUTS for part in [""] * (len(character.encode()) - 1) + [character]]
    assert [stream.push(byte) for byte in UMLAUTS.encode()] == want
    assert (stream.text, stream.flush()) == (UMLAUTS, "")
    assert len(stream.window) <= 5, "a token's cost would grow with the text"


@given(st.lists(st.sampled_from([*UMLAUTS.encode(), 0xFF, 257, 258, 259]), max_size=30))
def test_deltas_joined_are_the_text(decode, tokens):
    """Also where the bytes are no text, or cut, with special and unknown tokens among them."""
    stream = TextStream(decode)
    text = ""
    for token in tokens:
        delta = stream.push(token)
        assert not delta.endswith("\ufffd")
        text += delta
        assert stream.text == text
    assert text + stream.flush() == decode(tokens)
