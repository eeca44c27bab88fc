"""The frozen language model in 8 and 4 bits, by bitsandbytes itself: what it answers, its gradients, its bytes.

A quantised model is compared with the plain one, and with its twin: a plain model whose matrices are the quantised ones
widened again. In 4 bits the twin computes the same; in 8 bits inputs are rounded too.
"""

import random
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from test_language_ranking import build_gpt2
from test_memory_law import LAW_LEAVES_OUT, saved_buffers
from tolerances import FLOAT32_GRADIENT, FLOAT32_NETWORK, relative_difference, rms_difference
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import LanguageConfig, ModelConfig, QFormerConfig
from model.language import FrozenLanguageModel
from recipes.small_world.reading import example
from stages.data.cards import load_card
from stages.networks.build import load_language
from stages.networks.memory_law import frozen_bytes, language_kept_bytes
from stages.networks.quantization import layer_matrices, num_values, quantize_layers
from stages.networks.tokens import Tokenizers

bitsandbytes = pytest.importorskip("bitsandbytes")

SOURCE = "bundled:tiny-instructblip"
CLIPS, QUERIES = 12, 8
KINDS = ("int8", "nf4")
# Root mean square of the difference over that of the value. Four bits are coarse for matrices of 96 columns: the tiny
# model gives the same answers, but how sure it is of them changes, and with it the gradient.
LOGITS = {"int8": 0.02, "nf4": 0.25}
GRADIENT = {"int8": 0.1, "nf4": 1.0}
COSINE = {"int8": 0.995, "nf4": 0.5}
# Of two bfloat16 computations of the same.
BFLOAT16 = {"logits": 0.02, "gradient": 0.1}


def read(kind, dtype=torch.float32):
    return load_language(LanguageConfig(source=SOURCE, quantize=kind), dtype)


def twin_of(quantised, plain):
    """The plain model with the matrices that the quantised one has."""
    for name, matrix in layer_matrices(plain):
        stored = quantised.get_submodule(name)
        if isinstance(stored, bitsandbytes.nn.Linear4bit):
            wide = bitsandbytes.functional.dequantize_4bit(stored.weight.data, stored.weight.quant_state)
        else:
            scale = stored.weight.SCB if stored.weight.SCB is not None else stored.state.SCB
            wide = stored.weight.data * scale[:, None] / 127
        matrix.weight.data.copy_(wide if isinstance(matrix, torch.nn.Linear) else wide.T)
    return plain


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizers.load(ModelConfig(qformer=QFormerConfig(source=SOURCE), language=LanguageConfig(source=SOURCE)))


@dataclass(frozen=True)
class Asked:
    """One model that is asked what the tiny one was taught: captions, in place of queries, and questions."""

    model: object
    tokenizers: Tokenizers
    dtype: torch.dtype = torch.float32

    def cast(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @cached_property
    def language(self):
        return FrozenLanguageModel(self.model, self.tokenizers.special)

    @cached_property
    def examples(self):
        """Ids of captions, prompts, answers."""
        card, rng, chosen = load_card("synthetic"), random.Random(3), []
        while len(chosen) < CLIPS:
            caption, prompt, answer = example(card, rng)
            ids = self.tokenizers.language(caption, add_special_tokens=False)["input_ids"]
            if len(ids) == QUERIES:
                chosen.append((ids, prompt, answer))
        return tuple(zip(*chosen, strict=True))

    def queries(self):
        words = self.model.get_input_embeddings()(torch.tensor(self.examples[0]))
        return words.detach().float().requires_grad_()

    @cached_property
    def wrong(self):
        """Wrong answers: of right ones it is so sure that there is next to no gradient."""
        _, prompts, answers = self.examples
        return self.tokenizers.training(prompts, answers[1:] + answers[:1])

    @cached_property
    def logits(self):
        mask = torch.cat([torch.ones(CLIPS, QUERIES, dtype=torch.bool), self.wrong.mask], dim=1)
        with torch.no_grad(), self.cast():
            return self.language._run(self.queries(), self.wrong.ids, mask, use_cache=False).logits.float()[mask]

    def gradient(self):
        """At the inputs; the answers' loss goes back through all layers."""
        queries = self.queries()
        with self.cast():
            loss = self.language.answer_loss(queries, self.wrong)
        return torch.autograd.grad(loss, queries)[0]

    def answers(self):
        ids, mask = self.tokenizers.prompts(self.examples[1])
        with self.cast():
            found = self.language.generate(
                self.queries(), ids, mask, LanguageConfig(num_beams=2, max_new_tokens=7, repetition_penalty=1.0)
            )
        return tuple(beams[0] for beams in self.tokenizers.decode(found.ids))


@pytest.fixture(scope="module")
def plain(tokenizers):
    return Asked(read("none"), tokenizers)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def quantised(kind, tokenizers):
    return Asked(read(kind), tokenizers)


# --- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_the_gradient_at_the_inputs_are_near_those_of_the_plain_model(kind, plain, tokenizers, dtype):
    found = Asked(read(kind, dtype), tokenizers, dtype)
    assert 0 < rms_difference([found.logits], [plain.logits]) < LOGITS[kind]
    mine, its = found.gradient(), plain.gradient()
    assert 0 < rms_difference([mine], [its]) < GRADIENT[kind]
    assert torch.cosine_similarity(mine.flatten(), its.flatten(), dim=0) > COSINE[kind]
    assert (mine.abs().amax((1, 2)) > 0).all()


def test_the_answers_are_those_that_the_model_was_taught(quantised, plain):
    assert quantised.answers() == plain.answers() == plain.examples[2]


def test_it_computes_what_its_stored_matrices_say_and_leads_back_the_gradient_of_that(kind, quantised, tokenizers):
    twin = Asked(twin_of(quantised.model, read("none")), tokenizers)
    if kind == "nf4":
        assert relative_difference(quantised.logits, twin.logits) < FLOAT32_NETWORK
        assert relative_difference(quantised.gradient(), twin.gradient()) < FLOAT32_GRADIENT
    else:
        assert rms_difference([quantised.logits], [twin.logits]) < LOGITS[kind]
        assert rms_difference([quantised.gradient()], [twin.gradient()]) < GRADIENT[kind]


def test_in_bfloat16_four_bits_are_as_near_their_twin_as_bfloat16_is(tokenizers):
    found = Asked(read("nf4", torch.bfloat16), tokenizers, torch.bfloat16)
    twin = Asked(twin_of(found.model, read("none")), tokenizers)
    assert rms_difference([found.logits], [twin.logits]) < BFLOAT16["logits"]
    assert rms_difference([found.gradient()], [twin.gradient()]) < BFLOAT16["gradient"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_passes_after_answering_as_it_did_before(kind, tokenizers, dtype):
    """On processors with bfloat16 instructions bitsandbytes packs 4-bit matrices anew when there is no gradient."""
    asked = Asked(read(kind, dtype), tokenizers, dtype)
    before = asked.gradient()
    asked.answers()
    assert torch.equal(asked.gradient(), before)


def test_a_model_whose_matrices_are_turned_over_is_quantised_alike(kind):
    """GPT-2's, with biases."""
    built, same = build_gpt2().eval(), build_gpt2().eval()
    same.load_state_dict(built.state_dict())
    ids = torch.randint(5, 40, (3, 9))
    quantize_layers(built, kind, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        found, plain = built(input_ids=ids).logits, same(input_ids=ids).logits
        assert 0 < rms_difference([found], [plain]) < LOGITS[kind]
        if kind == "nf4":
            assert relative_difference(found, twin_of(built, same)(input_ids=ids).logits) < FLOAT32_NETWORK


# --- what it takes


def tensors_of(model):
    """Every tensor that a model holds, bitsandbytes' scales and tables among them."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
        weight, state = getattr(module, "weight", None), getattr(module, "state", None)
        for holder in (weight, state):
            yield from (part for name in ("CB", "SCB") if (part := getattr(holder, name, None)) is not None)
        packed = getattr(weight, "quant_state", None)
        if packed is not None:
            yield from (packed.absmax, packed.code, packed.offset, packed.state2.absmax, packed.state2.code)


def bytes_of(model):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(model)}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_weights_take_the_bytes_that_the_arithmetic_says(kind, plain, dtype):
    for used in (False, True):
        found = read(kind, dtype)
        if used:
            found(input_ids=torch.ones(1, 3, dtype=torch.long))
        assert bytes_of(found) == frozen_bytes(plain.model, kind, bytes_each=dtype.itemsize)
    assert bytes_of(read("none", dtype)) == frozen_bytes(plain.model, "none", bytes_each=dtype.itemsize)


def test_the_layers_matrices_are_quantised_and_nothing_else(kind, quantised, plain):
    expected = {name for name, _ in layer_matrices(plain.model)}
    stored = {"int8": torch.int8, "nf4": torch.uint8}[kind]
    found = {name.removesuffix(".weight") for name, part in quantised.model.named_parameters() if part.dtype == stored}
    assert found == expected
    assert len(expected) == 7 * plain.model.config.num_hidden_layers
    assert not any(part.requires_grad for part in quantised.model.parameters())
    assert sum(map(num_values, quantised.model.parameters())) == plain.model.num_parameters()


def of_products(tensor):
    """The tensors that bitsandbytes' products keep for their backward pass, which are not among autograd's own."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        yield from (part for part in getattr(node, "tensors", ()) if isinstance(part, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layers", "width", "inner"), [(2, 256, 512), (3, 128, 640)])
def test_a_quantised_llama_keeps_what_the_law_says(kind, layers, width, inner, dtype):
    config = LlamaConfig(
        vocab_size=50, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(requires_grad=False)
    quantize_layers(model, kind, dtype, torch.device("cpu"))
    out, kept = saved_buffers(model, 3, 17)
    kept |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in of_products(out)}
    for part in tensors_of(model):
        kept.pop(part.untyped_storage().data_ptr(), None)
    measured, law = sum(kept.values()), 3 * 17 * language_kept_bytes(config, bytes_each=dtype.itemsize, quantize=kind)
    assert abs(measured - law) <= LAW_LEAVES_OUT * law, (measured, law)
