"""The sides that run an exported graph: OpenVINO and ONNX Runtime.

Networks are exported from diffusers' own, once a model, with free sizes; each case then fixes
them, which both libraries use to plan memory and kernels. A picture is diffusers' loop and solver
around the exported networks, as their pipelines do it.
"""

from __future__ import annotations

import functools
import gc
import itertools
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import inputs, weights
from benchmarks.compare.cases import GUIDANCE, Case, words
from benchmarks.compare.weights import PROMPT

Run = Callable[..., np.ndarray]
FREE = {
    "unet": {"x": {0: "rows", 2: "h", 3: "w"}, "t": {}, "context": {0: "rows"}},
    "decoder": {"z": {0: "rows", 2: "h", 3: "w"}},
    "encoder": {"pixels": {0: "rows", 2: "H", 3: "W"}},
    "text": {"ids": {0: "rows"}},
}
"""Inputs of each network, and the names of their sizes that are free."""
PARTS = {
    "step": ("unet",),
    "start": ("unet",),
    "decode": ("decoder",),
    "encode": ("encoder",),
    "picture": ("text", "unet", "decoder"),
}


def place_of(kind: str, model: str, cache: Path, part: str) -> Path:
    """Where a network's export lies."""
    return cache / f"{model}-{weights.FORMAT}-{kind}" / part


def exported_parts(side: str, case: Case, cache: Path) -> bool:
    """Whether all that a case needs is exported."""
    places = (place_of(side, case.model, cache, part) for part in PARTS[case.kind])
    return all((place / "complete").is_file() for place in places)


class Exported(ABC):
    """What both have in common."""

    kind: str

    def __init__(self, model: str, cache: Path, threads: int) -> None:
        self.name, self.cache, self.threads = model, cache, threads
        self._times = itertools.cycle(inputs.LATER)
        self._call: Callable[[float], np.ndarray] | None = None

    def export(self, case: Case) -> None:
        for part in PARTS[case.kind]:
            place = place_of(self.kind, self.name, self.cache, part)
            if (place / "complete").is_file():
                continue
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            net, example = _network(part, weights.folder(self.name, self.cache), case)
            self.write(net, example, part, place)
            (place / "complete").touch()
            del net
            gc.collect()

    def load(self, case: Case) -> None:
        return

    def prepare(self, case: Case) -> None:
        self._call = None
        gc.collect()
        given = inputs.of(case)
        if case.kind == "picture":
            self._call = self._picture(case)
            return
        (part,) = PARTS[case.kind]
        run = self.network(part, case)
        if part == "unet":
            x, contexts = inputs.guided(given)
            self._call = lambda t: run(x, np.array(t, dtype=np.float32), contexts)
        else:
            only = given.pixels if part == "encoder" else given.latents
            self._call = lambda _: run(only)

    def run(self, first: bool) -> np.ndarray | None:
        assert self._call is not None
        answer = self._call(inputs.FIRST if first else next(self._times))
        return np.array(answer) if first else None

    @abstractmethod
    def write(self, net: Any, example: tuple[Any, ...], part: str, place: Path) -> None:
        """Export a torch module."""

    @abstractmethod
    def network(self, part: str, case: Case) -> Run:
        """A network with a case's sizes fixed."""

    def _picture(self, case: Case) -> Callable[[float], np.ndarray]:
        import torch
        from diffusers import DPMSolverMultistepScheduler
        from transformers import CLIPTokenizer

        from safelight.diffusion.noise import initial_noise
        from safelight.nets.vae import to_uint8

        torch.set_num_threads(self.threads)
        folder, batch = weights.folder(self.name, self.cache), case.batch
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        solver: Any = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
        text, unet, decoder = (self.network(part, case) for part in PARTS["picture"])
        cells = case.size // case.spec.vae.factor
        shape = (1, case.spec.vae.latent_channels, cells, cells)
        noise = torch.cat([initial_noise(inputs.SEED + k, shape) for k in range(batch)])

        def picture(_: float) -> np.ndarray:
            ids = tokenizer(
                [""] * batch + [PROMPT] * batch,
                padding="max_length",
                max_length=words(case.spec),
                truncation=True,
                return_tensors="np",
            )["input_ids"]
            contexts = text(ids.astype(np.int64))
            solver.set_timesteps(case.steps)
            x = noise * solver.init_noise_sigma
            for t in solver.timesteps:
                both = solver.scale_model_input(torch.cat([x, x]), t).numpy()
                answer = torch.from_numpy(unet(both, np.array(t, dtype=np.float32), contexts))
                plain, told = answer.chunk(2)
                guided = plain + GUIDANCE * (told - plain)
                x = solver.step(guided, t, x, return_dict=False)[0]
            return to_uint8(torch.from_numpy(decoder(x.numpy()))).numpy()

        return picture


class OpenVINO(Exported):
    """OpenVINO's CPU device, in float32: left alone it would compute in bfloat16 where it can."""

    kind = "openvino"

    def write(self, net: Any, example: tuple[Any, ...], part: str, place: Path) -> None:
        import openvino as ov  # pyright: ignore[reportMissingImports]

        shapes = [
            ov.PartialShape([-1 if k in free else size for k, size in enumerate(given.shape)])
            for given, free in zip(example, FREE[part].values(), strict=True)
        ]
        model = ov.convert_model(net, example_input=example, input=shapes)
        for found, name in zip(model.inputs, FREE[part], strict=True):
            found.get_tensor().set_names({name})
        ov.save_model(model, place / "net.xml", compress_to_fp16=False)

    def network(self, part: str, case: Case) -> Run:
        import openvino as ov  # pyright: ignore[reportMissingImports]

        place = place_of(self.kind, self.name, self.cache, part)
        core = ov.Core()
        model = core.read_model(place / "net.xml")
        model.reshape(dict(zip(FREE[part], _shapes(part, case), strict=True)))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
        }
        if case.kind == "start":  # what it has for a fast start
            settings["CACHE_DIR"] = str(place / "compiled")
        asked = core.compile_model(model, "CPU", settings).create_infer_request()

        def run(*arrays: np.ndarray) -> np.ndarray:
            asked.infer(dict(zip(FREE[part], arrays, strict=True)), share_inputs=True)
            return np.array(asked.get_output_tensor(0).data)

        return run


class OnnxRuntime(Exported):
    """ONNX Runtime's CPU provider, all graph optimisations, sizes fixed."""

    kind = "onnxruntime"

    def write(self, net: Any, example: tuple[Any, ...], part: str, place: Path) -> None:
        import torch

        torch.onnx.export(
            net,
            example,
            str(place / "net.onnx"),  # no Path: above 2 GiB it asks for a string
            input_names=list(FREE[part]),
            output_names=["answer"],
            dynamic_axes={name: free for name, free in FREE[part].items() if free},
            opset_version=18,
            dynamo=False,  # its successor fixes the sizes of this network
        )

    def network(self, part: str, case: Case) -> Run:
        import onnxruntime as ort  # pyright: ignore[reportMissingImports]

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        for free, shape in zip(FREE[part].values(), _shapes(part, case), strict=True):
            for axis, name in free.items():
                options.add_free_dimension_override_by_name(name, shape[axis])
        place = place_of(self.kind, self.name, self.cache, part)
        session = ort.InferenceSession(
            place / "net.onnx", options, providers=["CPUExecutionProvider"]
        )
        kinds = {found.name: found.shape for found in session.get_inputs()}

        def run(*arrays: np.ndarray) -> np.ndarray:
            asked = dict(zip(FREE[part], arrays, strict=True))
            return session.run(None, {k: v for k, v in asked.items() if k in kinds})[0]

        return run


def _shapes(part: str, case: Case) -> Sequence[tuple[int, ...]]:
    """Of a network's inputs, in order."""
    spec, many = case.spec, case.batch
    cells, tokens = case.size // spec.vae.factor, words(spec)
    latents = (spec.unet.in_channels, cells, cells)
    if part == "unet":
        return [(2 * many, *latents), (), (2 * many, tokens, spec.unet.context_width)]
    if part == "text":
        return [(2 * many, tokens)]
    return [(many, *latents) if part == "decoder" else (many, 3, case.size, case.size)]


def _network(part: str, folder: Path, case: Case) -> tuple[Any, tuple[Any, ...]]:
    """diffusers' network as a function of tensors alone, and an example of its inputs."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    class Around(torch.nn.Module):
        def __init__(self, net: torch.nn.Module, call: Callable[..., Any]) -> None:
            super().__init__()
            self.net, self.call = net, call

        def forward(self, *given: Any) -> Any:
            return self.call(self.net, *given)

    if part == "unet":
        net = UNet2DConditionModel.from_pretrained(folder / "unet")
        call = _predict
    elif part == "text":
        from transformers import CLIPTextModel

        net = CLIPTextModel.from_pretrained(folder / "text_encoder", attn_implementation="eager")
        call = _read
    else:
        net = AutoencoderKL.from_pretrained(folder / "vae")
        scale = float(net.config["scaling_factor"])
        call = functools.partial(_decode, scale) if part == "decoder" else _encode
    net.requires_grad_(False).eval()
    example = tuple(
        torch.ones(shape, dtype=torch.int64) if part == "text" else torch.randn(shape)
        for shape in _shapes(part, case)
    )
    return Around(net, call).eval(), example


def _predict(net: Any, x: Any, t: Any, context: Any) -> Any:
    return net(x, t, encoder_hidden_states=context, return_dict=False)[0]


def _read(net: Any, ids: Any) -> Any:
    return net(input_ids=ids, return_dict=False)[0]


def _decode(scale: float, net: Any, z: Any) -> Any:
    return net.decode(z / scale, return_dict=False)[0]


def _encode(net: Any, pixels: Any) -> Any:
    return net.quant_conv(net.encoder(pixels)).chunk(2, dim=1)[0]
