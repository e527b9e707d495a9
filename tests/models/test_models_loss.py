"""The chunked loss against the plain one; CausalLMLoss against the model's own logits."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models import CausalLMLoss, LossMismatch, ModelError, build_model, choose_loss, chunked_cross_entropy, unused_parameters
from models.loss import chunk_size, cross_entropy_reference, logit_scale_and_softcap

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DEEPSEEK = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
JETMOE = {"hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 1, "kv_channels": 8, "intermediate_size": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 5.0},
}


def problem(N=300, D=48, V=701, seed=0, dtype=torch.float32, bias=False):
    """-> hidden (N, D), weight (V, D), bias (V,) or None, wanting gradients; targets (N,), a seventh ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=g) * 0.3).to(dtype).requires_grad_()
    b = torch.randn(V, generator=g).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(V, (N,), generator=g)
    targets[::7] = -100
    return hidden, weight, b, targets


def value_and_gradients(function, hidden, weight, bias, targets, autocast=False, **options):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(hidden, weight, targets, bias=bias, **options)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    return loss, torch.autograd.grad(loss, inputs)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_tokens", [1, 64, 300, 1000])  # 300 = 4 x 64 + 44: a ragged end too
def test_equals_reference_in_float32(variant, chunk_tokens):
    options = dict(VARIANTS[variant])
    inputs = problem(bias=options.pop("bias", False))
    loss, grads = value_and_gradients(chunked_cross_entropy, *inputs, chunk_tokens=chunk_tokens, **options)
    expected, expected_grads = value_and_gradients(cross_entropy_reference, *inputs, **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert relative(loss, expected) < 3e-6  # worst of 200 (10 seeds): 6.4e-7
    for grad, other in zip(grads, expected_grads, strict=True):
        assert relative(grad, other) < 3e-6  # worst of 200: 4.5e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_reference_under_bfloat16_autocast(variant):
    options = dict(VARIANTS[variant])
    inputs = problem(bias=options.pop("bias", False))
    _, exact_grads = value_and_gradients(cross_entropy_reference, *inputs, **options)
    expected, expected_grads = value_and_gradients(cross_entropy_reference, *inputs, autocast=True, **options)
    loss, grads = value_and_gradients(chunked_cross_entropy, *inputs, autocast=True, chunk_tokens=64, **options)
    assert loss.dtype == torch.float32
    assert relative(loss, expected) < 1e-6  # worst of 50 (10 seeds): 1.4e-7
    for grad, other, true in zip(grads, expected_grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert relative(grad, other) < 5e-3  # worst of 50: 2.4e-3
        assert relative(grad, true) < 1.2 * relative(other, true)  # worst of 50: 1.02 times, where autocast gives 3.9e-3
    assert relative(grads[0], exact_grads[0]) > 1e-3  # autocast was on


def test_weight_gradient_is_accumulated_in_float32():
    hidden, weight, _, targets = problem(N=1024, V=50, seed=1)
    exact = value_and_gradients(cross_entropy_reference, hidden, weight, None, targets)[1][1]
    grad = value_and_gradients(chunked_cross_entropy, hidden, weight, None, targets, autocast=True, chunk_tokens=1)[1][1]
    assert relative(grad, exact) < 6e-3  # worst of 5 seeds: 3.0e-3; accumulated in bfloat16 it would be 2.0e-2


def test_bfloat16_inputs_without_autocast():
    hidden, weight, bias, targets = problem(dtype=torch.bfloat16, bias=True)
    loss, grads = value_and_gradients(chunked_cross_entropy, hidden, weight, bias, targets, chunk_tokens=64)
    exact, exact_grads = value_and_gradients(
        cross_entropy_reference, *(x.detach().float().requires_grad_() for x in (hidden, weight, bias)), targets
    )
    assert loss.dtype == torch.float32
    assert relative(loss, exact) < 3e-4  # worst of 10 seeds: 7.5e-5
    for grad, other in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert relative(grad, other) < 1e-2  # worst of 10 seeds: 3.5e-3


def test_gradients_by_finite_differences():
    hidden, weight, bias, targets = problem(N=9, D=4, V=7, dtype=torch.float64, bias=True)

    def loss(hidden, weight, bias):
        return chunked_cross_entropy(hidden, weight, targets, bias=bias, scale=0.7, softcap=2.0, chunk_tokens=4)

    assert gradcheck(loss, (hidden, weight, bias))


def test_tied_weight_used_twice_and_graph_walked_twice():
    def losses(function):
        hidden, weight, _, targets = problem()
        embedded = hidden + F.embedding(targets.clamp_min(0), weight)  # tied: weight is looked up and multiplied
        total = function(embedded, weight, targets) + 3 * function(embedded * 0.5, weight, targets)
        total.backward(retain_graph=True)
        once = weight.grad.clone()
        total.backward()
        assert torch.allclose(weight.grad, 2 * once, rtol=1e-6, atol=1e-6)
        return hidden.grad, weight.grad

    for grad, other in zip(losses(chunked_cross_entropy), losses(cross_entropy_reference), strict=True):
        assert relative(grad, other) < 1e-5


def test_only_wanted_gradients_are_computed():
    hidden, weight, _, targets = problem()
    one_matmul = 2 * 300 * 48 * 701

    def flops(hidden, weight):
        with FlopCounterMode(display=False) as counter:
            chunked_cross_entropy(hidden, weight, targets, chunk_tokens=64)
        return counter.get_total_flops()

    assert flops(hidden, weight) == 3 * one_matmul
    assert flops(hidden.detach(), weight) == flops(hidden, weight.detach()) == 2 * one_matmul
    assert flops(hidden.detach(), weight.detach()) == one_matmul
    with torch.no_grad():
        assert flops(hidden, weight) == one_matmul
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=64)
    assert not loss.requires_grad
    assert relative(loss, cross_entropy_reference(hidden, weight, targets)) < 1e-6


def test_ignored_tokens_count_nothing():
    hidden, weight, _, targets = problem()
    with torch.no_grad():
        hidden[targets == -100] = float("nan")  # whatever their hidden state
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=64)
    kept = targets != -100
    assert relative(loss, cross_entropy_reference(hidden[kept], weight, targets[kept])) < 1e-6
    hidden, weight, _, targets = problem()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_never_waits_for_the_device():
    with FakeTensorMode():  # tensors without data: whatever looks at a value (.item(), a branch) raises
        hidden, weight = torch.empty(300, 48, requires_grad=True), torch.empty(701, 48, requires_grad=True)
        targets = torch.empty(300, dtype=torch.long)
        with pytest.raises(DataDependentOutputException):
            targets.sum().item()
        chunked_cross_entropy(hidden, weight, targets, scale=0.5, softcap=3.0, chunk_tokens=64).backward()
        assert weight.grad.shape == (701, 48)


def test_wrong_shapes_are_errors():
    hidden, weight, _, targets = problem()
    with pytest.raises(ValueError, match=r"expected hidden \(N, D\)"):
        chunked_cross_entropy(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"got hidden \(300, 48\), weight \(48, 701\)"):
        chunked_cross_entropy(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"targets \(299,\)"):
        chunked_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1"):
        chunked_cross_entropy(hidden, weight, targets, chunk_tokens=0)


def peak_bytes(step) -> int:
    """The most bytes that `step` held at once beyond what was there before, from the allocator's own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_default_chunk_is_an_eighth_within_bounds():
    assert [chunk_size(tokens) for tokens in (1, 1024, 2048, 4096, 8191, 32768)] == [128, 128, 256, 512, 1024, 1024]


def test_peak_memory_is_a_fraction_of_naive():
    """In default chunks, an eighth of these tokens, under a quarter."""
    hidden, weight, _, targets = problem(N=2048, D=256, V=50257)

    def step(function, **options):
        loss = function(hidden, weight, targets, **options)
        torch.autograd.grad(loss, (hidden, weight))

    naive = peak_bytes(lambda: step(cross_entropy_reference))
    chunked = peak_bytes(lambda: step(chunked_cross_entropy))
    figures = f"{naive / 2**20:.0f} MiB naive, {chunked / 2**20:.0f} MiB in chunks"
    print(f"\n2048 tokens x 256 -> 50257, float32: peak {figures}")
    logits = 2048 * 50257 * 4
    assert naive > 2 * logits  # the measurement sees the logits: 3.0 of their size, 1178 MiB
    assert chunked < naive / 4  # 149 MiB, 0.13 of naive: two chunks of logits and the weight's gradient


def own_logits_loss(model, input_ids, targets):
    logits = model(input_ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


ARCHITECTURES = {
    "gpt3": None,
    "qwen3": {**SMALL, "head_dim": 16},
    "llama": SMALL,
    "gpt2": GPT2,
    "mixtral": {**SMALL, "num_local_experts": 4},
    "phi": {**SMALL, "num_key_value_heads": 4},  # a bias on the output
    "gemma2": {**SMALL, "head_dim": 16, "final_logit_softcapping": 2.0},
    "granite": {**SMALL, "logits_scaling": 8.0},
    "cohere": {**SMALL, "logit_scale": 0.25},
}


def small_model(name):
    torch.manual_seed(0)
    if ARCHITECTURES[name] is None:
        return build_model(layers=2, width=64, heads=4, context=64, vocab_size=101)
    options = {key: 0.0 for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop") if name == "gpt2"}
    return build_model(hf={"model_type": name, **ARCHITECTURES[name], **options}, vocab_size=101)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_causal_lm_loss_equals_the_models_own_logits(name):
    model = small_model(name)
    loss = CausalLMLoss(model, chunk_tokens=10)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # logits that are not near zero
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    ids = torch.randint(101, (3, 18), generator=torch.Generator().manual_seed(0))
    input_ids, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :4] = -100
    actual, expected = loss(input_ids, targets), own_logits_loss(model, input_ids, targets)
    assert relative(actual, expected) < 1e-6  # worst of 9: 1.1e-7
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(actual, parameters.values())
    theirs = torch.autograd.grad(expected, parameters.values())
    for key, a, b in zip(parameters, ours, theirs, strict=True):
        assert (a - b).norm() < 3e-6 * (b.norm() + 0.1), key  # worst of 9: 3.5e-7; a k bias has gradient zero
    choose_loss(model)
    assert model.chunked_loss and model.training


@pytest.mark.parametrize(("name", "key"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")])
def test_logits_that_the_chunks_do_not_know_are_taken_from_the_model(name, key, monkeypatch):
    monkeypatch.setattr("models.loss.logit_scale_and_softcap", lambda config: (1.0, None))
    model = small_model(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    ids = torch.randint(101, (3, 18), generator=torch.Generator().manual_seed(0))
    own = own_logits_loss(model, ids[:, :-1], ids[:, 1:])
    assert relative(CausalLMLoss(model)(ids[:, :-1], ids[:, 1:]), own) > 1e-3  # as if nobody had looked
    choose_loss(model)
    assert not model.chunked_loss
    assert relative(CausalLMLoss(model)(ids[:, :-1], ids[:, 1:]), own) < 1e-6


def test_an_output_layer_that_does_more_than_project_is_taken_from_the_model():
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = build_model(hf={"model_type": "bert", "is_decoder": True, **small}, vocab_size=101).eval()
    choose_loss(model)
    assert not model.chunked_loss
    ids = torch.randint(101, (3, 18), generator=torch.Generator().manual_seed(0))
    assert relative(CausalLMLoss(model)(ids[:, :-1], ids[:, 1:]), own_logits_loss(model, ids[:, :-1], ids[:, 1:])) < 1e-6


@pytest.mark.parametrize(
    ("model_type", "widths"),
    [
        ("electra", {"embedding_size": 32}),
        ("roformer", {"embedding_size": 32}),
        ("rembert", {"input_embedding_size": 32, "output_embedding_size": 48}),
    ],
)
def test_an_output_layer_of_another_width_is_taken_from_the_model(model_type, widths):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96, "pad_token_id": 0}
    model = build_model(hf={"model_type": model_type, "is_decoder": True, **small, **widths}, vocab_size=101).eval()
    choose_loss(model)
    assert not model.chunked_loss
    ids = torch.randint(101, (3, 18), generator=torch.Generator().manual_seed(0))
    assert relative(CausalLMLoss(model)(ids[:, :-1], ids[:, 1:]), own_logits_loss(model, ids[:, :-1], ids[:, 1:])) < 1e-6


def test_choosing_leaves_no_trace():
    model = small_model("phi").to(torch.bfloat16).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    choose_loss(model)
    assert model.chunked_loss
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "xlnet", "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}, "XLNetLMHeadModel is not causal"),
        (
            {"model_type": "bert", **SMALL_BERT},
            r"Bert\w+ is not causal .*; set is_decoder to true, in model\.hf or, for weights of a folder, in its config\.json$",
        ),
        ({"model_type": "roberta", "is_decoder": True, **SMALL_BERT}, "forward pass fails: .*None.*; keys .* are pad_token_id"),
        ({"model_type": "deepseek_v3", **DEEPSEEK, "output_router_logits": True}, "DeepseekV3ForCausalLM has no router loss"),
        ({"model_type": "jetmoe", **JETMOE, "output_router_logits": True}, "JetMoeForCausalLM has no router loss that"),
    ],
)
def test_a_model_that_cannot_be_trained_says_so_in_one_line(hf, message):
    with pytest.raises((ModelError, LossMismatch), match=message) as caught:
        choose_loss(build_model(hf=hf, vocab_size=101))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_parameters_without_a_gradient_are_found():
    assert not unused_parameters(CausalLMLoss(small_model("gpt3")))
    bart = {"model_type": "bart", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    assert unused_parameters(CausalLMLoss(build_model(hf=bart, vocab_size=101)))  # cross-attention without an encoder


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_router_loss_is_added_in_training_if_asked_for(model_type):
    experts = {"num_local_experts": 4} if model_type == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 32}
    hf = {"model_type": model_type, **SMALL, **experts, "num_experts_per_tok": 2, "output_router_logits": True}
    torch.manual_seed(0)
    model = build_model(hf=hf, vocab_size=101)
    loss = CausalLMLoss(model)
    ids = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(0))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    own = 22 * model(ids, labels=ids).loss  # a mean over 2 x 11 targets, with the router's loss
    pure = own_logits_loss(model, ids, targets)
    assert own - pure > 1e-2
    assert relative(loss(ids, targets), own) < 1e-6
    assert relative(loss.eval()(ids, targets), pure) < 1e-6


def test_logit_scale_and_softcap_of_a_plain_configuration():
    assert logit_scale_and_softcap(small_model("gpt3").config) == (1.0, None)


def test_causal_lm_loss_compiles_without_graph_breaks():
    loss = CausalLMLoss(small_model("gpt3"), chunk_tokens=10)
    ids = torch.randint(101, (2, 17), generator=torch.Generator().manual_seed(0))

    def gradient(module):
        loss.zero_grad()
        module(ids[:, :-1], ids[:, 1:]).backward()
        return loss.model.lm_head.weight.grad.clone()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert relative(gradient(compiled), gradient(loss)) < 1e-6
