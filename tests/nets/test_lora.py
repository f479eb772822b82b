"""Adapters against PEFT and diffusers, by kohya's formula, and what they must leave alone."""

from __future__ import annotations

import json
from collections.abc import Iterator

import peft
import pytest
import torch
from benchmarks.parity_cases import text_case, unet_case
from benchmarks.parity_nets import Case
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor, nn

from safelight.errors import WeightsError
from safelight.nets import lora, lora_keys
from safelight.nets.clip import TextTower
from safelight.nets.lora import Adapter, Pair, attach, fresh, merge, targets
from safelight.nets.unet import UNet
from safelight.spec import TextSpec, UNetSpec
from safelight.store.keymaps import unet_rows

V1 = UNetSpec(
    sample_size=8,
    channels=(16, 32),
    attention=(True, False),
    heads=(2, 2),
    only_cross_attention=(False, False),
    context_width=24,
    norm_groups=8,
)
TEXT = TextSpec(
    vocab_size=64,
    width=32,
    layers=2,
    heads=4,
    mlp_width=96,
    context_length=12,
    bos_id=62,
    eos_id=63,
    pad_id=63,
)
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
EVERY_KIND = (
    *lora.UNET_ATTENTION,
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "time_emb_proj",
    *CONVOLUTIONS,
)
MLP = ("mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def unet() -> Case:
    return unet_case(V1, size=(6, 4), tokens=5)


@pytest.fixture
def peer(unet: Case) -> Iterator[nn.Module]:
    """diffusers' UNet on the same tensors, without what a test put into it."""
    yield unet.peer
    if getattr(unet.peer, "peft_config", None):
        unet.peer.delete_adapters(list(unet.peer.peft_config))


def random_adapter(
    network: nn.Module,
    endings: tuple[str, ...],
    *,
    rank: int = 3,
    alpha: float = 2.0,
    seed: int = 0,
) -> Adapter:
    """One whose changes are about a fifth as large as the layers' outputs."""
    generator = torch.Generator().manual_seed(seed)
    adapter = fresh(network, targets(network, endings), rank=rank, alpha=alpha, generator=generator)
    pairs = {}
    for path, (down, up, _) in adapter.pairs.items():
        up = torch.randn(up.shape, generator=generator) * 0.2
        pairs[path] = Pair(down.detach(), up, alpha)
    return Adapter(pairs)


@torch.no_grad()
def ours(case: Case, *uses: lora.Use, network: nn.Module | None = None) -> Tensor:
    network = case.ours if network is None else network
    with attach(network, uses):
        return next(iter(case.run_ours(network, case.inputs).values()))


@torch.no_grad()
def theirs(case: Case) -> Tensor:
    return next(iter(case.run_peer(case.peer, case.inputs).values()))


def assert_near(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * max(1.0, b.std().item())


def same(a: Adapter, b: Adapter) -> bool:
    return set(a.pairs) == set(b.pairs) and all(
        torch.equal(p.down, b.pairs[path].down)
        and torch.equal(p.up, b.pairs[path].up)
        and p.alpha == b.pairs[path].alpha
        for path, p in a.pairs.items()
    )


# -- against the reference ----------------------------------------------------------------------


def test_peft_s_own_adapter(unet: Case, peer: nn.Module) -> None:
    plain = theirs(unet)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        rank_pattern={"conv1": 2},
        alpha_pattern={"mid_block.attentions.0.proj_in": 1.5},
        target_modules=list(EVERY_KIND),
        init_lora_weights=False,
    )
    peer.add_adapter(config)
    state = {f"unet.{k}": v for k, v in peft.get_peft_model_state_dict(peer).items()}
    settings = {f"unet.{k}": v for k, v in config.to_dict().items()}
    metadata = {lora_keys.METADATA_KEY: json.dumps(settings, default=list)}
    adapter = lora_keys.read(state, {"unet": unet.ours}, metadata=metadata)["unet"]
    assert {pair.alpha for pair in adapter.pairs.values()} == {5, 1.5}
    assert {pair.rank for pair in adapter.pairs.values()} == {3, 2}
    assert (theirs(unet) - plain).abs().max() > 0.1
    assert_near(ours(unet, (adapter, 1.0)), theirs(unet))


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_diffusers_reads_what_we_write_and_we_read_it_back(
    unet: Case, peer: nn.Module, layout: str
) -> None:
    adapter = random_adapter(unet.ours, EVERY_KIND)
    state, metadata = lora_keys.write({"unet": adapter}, layout)
    back = lora_keys.read(state, {"unet": unet.ours}, metadata=metadata)["unet"]
    assert same(back, adapter) or layout == "diffusers"  # which multiplies alpha in
    assert_near(ours(unet, (back, 0.7)), ours(unet, (adapter, 0.7)))
    if layout == "kohya":
        given, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(state))
        peer.load_lora_adapter(given, prefix="unet", network_alphas=alphas, adapter_name="a")
    else:
        settings = json.loads(metadata[lora_keys.METADATA_KEY]) if metadata else None
        peer.load_lora_adapter(dict(state), prefix="unet", metadata=settings, adapter_name="a")
    peer.set_adapters("a", 0.7)
    assert_near(ours(unet, (adapter, 0.7)), theirs(unet))


def test_layers_under_the_original_repository_s_names(unet: Case) -> None:
    adapter = random_adapter(unet.ours, EVERY_KIND)
    rows = {"unet": unet_rows(V1)}
    table = lora_keys.spellings({"unet": unet.ours}, rows)
    # The original repository's is the last of a layer's kohya spellings.
    names = {place: stem for stem, place in table.items() if stem.startswith("lora_unet_")}
    state = {}
    for path, pair in adapter.pairs.items():
        stem = names["unet", path]
        state |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
        state[f"{stem}.alpha"] = torch.tensor(pair.alpha)
    assert "lora_unet_input_blocks_3_0_op.alpha" in state
    assert same(lora_keys.read(state, {"unet": unet.ours}, originals=rows)["unet"], adapter)
    with pytest.raises(WeightsError, match="input_blocks_1_0_in_layers_2"):
        lora_keys.read(state, {"unet": unet.ours})
    # diffusers' own arithmetic sends them to the same layers, but for an upsampler after no
    # attention, which it takes for one (its rule is for SDXL).
    state = {k: v for k, v in state.items() if "output_blocks_2_1_conv" not in k}
    given, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(state, unet_config=unet.peer.config)
    again = lora_keys.read(given, {"unet": unet.ours})["unet"]
    assert set(adapter.pairs) - set(again.pairs) == {"up_blocks.0.upsamplers.0.conv"}
    assert all(torch.equal(p.up, adapter.pairs[path].up) for path, p in again.pairs.items())


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_spellings_at_full_size_are_one_to_one(layers_per_block: int) -> None:
    spec = UNetSpec(layers_per_block=layers_per_block)
    with torch.device("meta"):
        networks = {"unet": UNet(spec), "text_encoder": TextTower(TextSpec())}
    table = lora_keys.spellings(networks, {"unet": unet_rows(spec)})  # raises where ambiguous
    for component, network in networks.items():
        assert {path for c, path in table.values() if c == component} == set(lora.layers(network))
    last = "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn2_to_out_0"
    place = ("unet", "up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_out.0")
    assert table[last] == place
    output = 3 * (layers_per_block + 1)
    assert table[f"lora_unet_output_blocks_{output}_1_transformer_blocks_0_attn2_to_out_0"] == place


def test_text_towers_in_every_spelling() -> None:
    case = text_case(TEXT)
    adapter = random_adapter(case.ours, (*lora.TEXT_ATTENTION, *MLP))
    networks = {"text_encoder": case.ours}
    for layout in ("kohya", "peft"):
        state, metadata = lora_keys.write({"text_encoder": adapter}, layout)
        assert same(lora_keys.read(state, networks, metadata=metadata)["text_encoder"], adapter)
        for old, new in (("lora_te_", "lora_te1_"), ("text_encoder.text_model.", "text_encoder.")):
            other = {key.replace(old, new): value for key, value in state.items()}
            again = lora_keys.read(other, networks, metadata=metadata)["text_encoder"]
            assert same(again, adapter)
    # The oldest: attention processors.
    old, stem = {}, "text_encoder.text_model.encoder.layers.1.self_attn"
    for new, name in (("q_proj", "to_q"), ("out_proj", "to_out")):
        pair = adapter.pairs[f"text_model.encoder.layers.1.self_attn.{new}"]
        old |= {f"{stem}.{name}_lora.down.weight": pair.down}
        old |= {f"{stem}.{name}_lora.up.weight": pair.up}
    read = lora_keys.read(old, networks)["text_encoder"]
    assert {path.rsplit(".", 1)[-1] for path in read.pairs} == {"q_proj", "out_proj"}
    assert all(pair.alpha == pair.rank for pair in read.pairs.values())
    # And it does what PEFT makes of it in transformers' tower.
    merged = merge(case.ours, [(adapter, 1.5)])
    expected = ours(case, (adapter, 1.5))
    assert (expected - ours(case)).abs().max() > 0.1
    assert_near(ours(case, network=merged), expected)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=[*lora.TEXT_ATTENTION, "fc1", "fc2"])
    peft.inject_adapter_in_model(config, case.peer)
    flat = {
        f"{path.removeprefix('text_model.')}.lora_{half}.weight": factor * scale
        for path, pair in adapter.pairs.items()
        for half, factor, scale in (("A", pair.down, 1.0), ("B", pair.up, pair.scale * 1.5))
    }
    peft.set_peft_model_state_dict(case.peer, flat)
    assert_near(expected, theirs(case))


def test_attention_processors_with_and_without_the_component_s_name(unet: Case) -> None:
    adapter = random_adapter(unet.ours, lora.UNET_ATTENTION)
    for prefix in ("unet.", ""):
        state = {}
        for path, pair in adapter.pairs.items():
            parent, _, last = path.removesuffix(".0").rpartition(".")
            stem = f"{prefix}{parent}.processor.{last}_lora"
            state |= {f"{stem}.down.weight": pair.down, f"{stem}.up.weight": pair.up}
        read = lora_keys.read(state, {"unet": unet.ours})["unet"]
        assert set(read.pairs) == set(adapter.pairs)


# -- the formula --------------------------------------------------------------------------------


def test_kohya_s_formula() -> None:
    torch.manual_seed(0)
    linear, one, three = nn.Linear(6, 5), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 3, 2, 1)
    network = nn.ModuleDict({"linear": linear, "one": one, "three": three})
    pairs = {
        "linear": Pair(torch.randn(2, 6), torch.randn(5, 2), 3.0),
        "one": Pair(torch.randn(2, 6, 1, 1), torch.randn(5, 2, 1, 1), 3.0),
        "three": Pair(torch.randn(2, 6, 3, 3), torch.randn(5, 2, 1, 1), 3.0),
    }
    merged = merge(network, [(Adapter(pairs), 0.5)])
    scale = 0.5 * 3.0 / 2
    for path, (down, up, _) in pairs.items():
        if path == "linear":
            delta = up @ down
        elif path == "one":
            delta = (up[..., 0, 0] @ down[..., 0, 0])[..., None, None]
        else:
            delta = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
        expected = network[path].weight + scale * delta
        assert torch.allclose(merged[path].weight, expected, atol=1e-6)
        x = torch.randn(3, 6) if path == "linear" else torch.randn(3, 6, 7, 7)
        with attach(network, [(Adapter({path: pairs[path]}), 0.5)]):
            assert torch.allclose(network[path](x), merged[path](x), atol=1e-5)


def test_runtime_equals_merged_with_several_adapters(unet: Case) -> None:
    style = random_adapter(unet.ours, EVERY_KIND, alpha=1.0)
    subject = random_adapter(unet.ours, ("to_q", "conv1"), rank=2, seed=9)
    uses = [(style, 0.8), (subject, -1.3)]
    runtime = ours(unet, *uses)
    assert (runtime - ours(unet)).abs().max() > 0.1
    assert_near(ours(unet, network=merge(unet.ours, uses)), runtime)


def test_factors_for_1x1_convolutions_serve_linear_projections_and_back(unet: Case) -> None:
    adapter = random_adapter(unet.ours, ("proj_in", "to_q"))
    turned = Adapter(
        {
            path: Pair(
                *(t.flatten(1) if t.ndim == 4 else t[..., None, None] for t in p[:2]), p.alpha
            )
            for path, p in adapter.pairs.items()
        }
    )
    assert {pair.down.ndim for pair in turned.pairs.values()} == {2, 4}
    assert torch.equal(ours(unet, (turned, 1.0)), ours(unet, (adapter, 1.0)))


def test_a_multiplier_a_row(unet: Case) -> None:
    a = random_adapter(unet.ours, EVERY_KIND, alpha=1.0)
    b = random_adapter(unet.ours, ("to_v",), seed=4)
    plain = ours(unet)
    together = ours(unet, (a, torch.tensor([0.0, 0.6])), (b, torch.tensor([1.0, 0.0])))
    assert_near(together[0], ours(unet, (b, 1.0))[0])
    assert_near(together[1], ours(unet, (a, 0.6))[1])
    assert torch.equal(ours(unet, (a, torch.tensor([0.0, 1.0])))[0], plain[0])
    with pytest.raises(ValueError, match="each row"):
        merge(unet.ours, [(a, torch.tensor([0.0, 1.0]))])


def test_half_precision_networks_take_float32_adapters() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 8))
    network = network.to_empty(device="cpu").to(torch.bfloat16)
    nn.init.eye_(network[0].weight)
    nn.init.zeros_(network[0].bias)
    adapter = Adapter({"0": Pair(torch.full((1, 8), 0.5), torch.full((8, 1), 0.25), 1.0)})
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    with attach(network, [(adapter, 1.0)]):
        out = network(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.full_like(out, 2.0))
    merged = merge(network, [(adapter, 1.0)])
    assert merged[0].weight.dtype == torch.bfloat16
    assert torch.equal(merged(x), out)


# -- what is left alone -------------------------------------------------------------------------


def test_shared_weights_are_never_touched(unet: Case) -> None:
    network, adapter = unet.ours, random_adapter(unet.ours, EVERY_KIND)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    places = {key: value.data_ptr() for key, value in network.state_dict().items()}
    plain = ours(unet)
    attachment = attach(network, [(adapter, 1.0), (adapter, 0.3)])
    attachment.detach()
    attachment.detach()
    merged = merge(network, [(adapter, 1.0)])
    assert not any(part._forward_hooks for part in network.modules())
    assert torch.equal(ours(unet), plain)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert {key: value.data_ptr() for key, value in network.state_dict().items()} == places
    changed = {key for key, v in merged.state_dict().items() if v.data_ptr() != places[key]}
    assert changed == {f"{path}.weight" for path in adapter.pairs}
    assert type(merged) is UNet
    assert merged.spec == network.spec


def test_a_view_keeps_adapters_to_itself(unet: Case) -> None:
    adapter = random_adapter(unet.ours, ("to_q", "conv1"))
    plain = ours(unet)
    with attach(unet.ours, [(adapter, 1.0)]):
        adapted = ours(unet)
        twin = lora.view(unet.ours)
        assert torch.equal(ours(unet, network=twin), plain)
    with attach(twin, [(adapter, 1.0)]):
        assert torch.equal(ours(unet), plain)
        assert torch.equal(ours(unet, network=twin), adapted)
    assert all(
        a.data_ptr() == b.data_ptr()
        for a, b in zip(twin.parameters(), unet.ours.parameters(), strict=True)
    )


def test_an_adapter_that_does_not_fit_attaches_nothing(unet: Case) -> None:
    good = random_adapter(unet.ours, ("to_q",))
    bad = Adapter({"mid_block.nowhere": Pair(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    with pytest.raises(ValueError, match=r"UNet does not have: mid_block\.nowhere"):
        attach(unet.ours, [(good, 1.0), (bad, 1.0)])
    wrong = Adapter({"conv_in": Pair(torch.ones(1, 4, 1, 1), torch.ones(16, 1, 1, 1), 1.0)})
    with pytest.raises(ValueError, match=r"conv_in: .*\(1, 4, 3, 3\)"):
        attach(unet.ours, [(good, 1.0), (wrong, 1.0)])
    assert not any(part._forward_hooks for part in unet.ours.modules())


# -- files that are wrong -----------------------------------------------------------------------


def small_state(network: nn.Module) -> dict[str, Tensor]:
    adapter = random_adapter(network, ("attn1.to_q", "attn1.to_k"))
    return lora_keys.write({"unet": adapter}, "kohya")[0]


def test_unknown_keys_are_listed(unet: Case) -> None:
    state = small_state(unet.ours)
    unknown = {"lora_unet_nowhere.alpha": torch.tensor(1.0), "stray": torch.ones(2)}
    with pytest.raises(
        WeightsError, match=r"style\.safetensors: .*lora_unet_nowhere\.alpha, stray"
    ):
        lora_keys.read(state | unknown, {"unet": unet.ours}, source="style.safetensors")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "another family"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "not given here"),
    ],
)
def test_what_the_unknown_keys_may_be(unet: Case, key: str, hint: str) -> None:
    with pytest.raises(WeightsError, match=hint):
        lora_keys.read({key: torch.ones(1)}, {"unet": unet.ours})


def test_missing_partners_and_wrong_shapes_are_errors(unet: Case) -> None:
    state = small_state(unet.ours)
    key = next(key for key in state if key.endswith("lora_up.weight"))
    with pytest.raises(WeightsError, match=r"factors is missing: unet\..*to_q"):
        lora_keys.read({k: v for k, v in state.items() if k != key}, {"unet": unet.ours})
    with pytest.raises(WeightsError, match="to_q: the factors are"):
        lora_keys.read(state | {key: torch.ones(7, 3)}, {"unet": unet.ours})
    with pytest.raises(WeightsError, match="to_q: the factors are"):  # ranks that differ
        lora_keys.read(state | {key: torch.ones(16, 2)}, {"unet": unet.ours})


def test_peft_settings(unet: Case) -> None:
    adapter = random_adapter(unet.ours, ("attn1.to_q",), rank=4)
    state, _ = lora_keys.write({"unet": adapter}, "peft")
    networks = {"unet": unet.ours}

    def read(text: str) -> float:
        metadata = {lora_keys.METADATA_KEY: text}
        pairs = lora_keys.read(state, networks, metadata=metadata)["unet"].pairs
        return next(iter(pairs.values())).alpha

    assert (
        next(iter(lora_keys.read(state, networks)["unet"].pairs.values())).alpha == 4
    )  # none said
    assert read('{"unet.lora_alpha": 8, "unet.use_rslora": true}') == 16  # 8 / sqrt(4) * 4 / 4
    with pytest.raises(WeightsError, match="DoRA"):
        read('{"unet.use_dora": true}')
    with pytest.raises(WeightsError, match="metadata"):
        read("{")


def test_a_layer_twice_in_one_file_is_an_error(unet: Case) -> None:
    state = small_state(unet.ours)
    key = next(key for key in state if key.endswith("lora_up.weight"))
    twice = state | {f"unet.{_dotted(unet, key)}.lora_B.weight": state[key]}
    with pytest.raises(WeightsError, match="lora_B"):
        lora_keys.read(twice, {"unet": unet.ours})


def _dotted(unet: Case, key: str) -> str:
    stem = key.removeprefix("lora_unet_").removesuffix(".lora_up.weight")
    return next(path for path in lora.layers(unet.ours) if path.replace(".", "_") == stem)


def test_both_networks_of_one_file() -> None:
    with torch.device("meta"):
        networks = {"unet": UNet(V1), "text_encoder": TextTower(TEXT)}
    adapters = {
        "unet": random_adapter(networks["unet"].to_empty(device="cpu"), ("to_q",)),
        "text_encoder": random_adapter(
            networks["text_encoder"].to_empty(device="cpu"), ("q_proj",)
        ),
    }
    for layout in ("kohya", "peft"):
        state, metadata = lora_keys.write(adapters, layout)
        read = lora_keys.read(state, networks, metadata=metadata)
        assert all(same(read[component], adapters[component]) for component in adapters)


# -- training -----------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_learns(unet: Case) -> None:
    paths = targets(unet.ours, lora.UNET_ATTENTION)
    assert len(paths) == 4 * 2 * (2 + 1 + 3)  # two layers down, the middle, three up
    generator = torch.Generator().manual_seed(0)
    adapter = fresh(unet.ours, paths, rank=2, generator=generator)
    assert all(pair.scale == 1 for pair in adapter.pairs.values())
    bound = adapter.pairs[paths[0]].down.shape[1] ** -0.5
    assert 0.8 * bound < adapter.pairs[paths[0]].down.abs().max() <= bound
    assert torch.equal(ours(unet, (adapter, 1.0)), ours(unet))
    optimiser = torch.optim.SGD(list(adapter.parameters()), lr=0.1)
    with attach(unet.ours, [(adapter, 1.0)]):
        for _ in range(2):  # the second pass sees what the first step changed
            optimiser.zero_grad()
            loss = unet.run_ours(unet.ours, unet.inputs)["prediction"].square().mean()
            loss.backward()
            optimiser.step()
    assert all(factor.grad is not None for factor in adapter.parameters())
    assert all(pair.down.grad.abs().sum() > 0 for pair in adapter.pairs.values())
    assert not torch.equal(ours(unet, (adapter, 1.0)), ours(unet))
    assert all(weight.grad is None for weight in unet.ours.parameters())
    assert adapter.to(torch.float16).pairs[paths[0]].up.dtype == torch.float16
