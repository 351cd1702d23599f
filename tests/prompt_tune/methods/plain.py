"""What parity tests compare with: open_clip's own forward, with some token embeddings exchanged.

Imported by path: `plain = load(Path(__file__).with_name("plain.py"))`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch, ClassTexts, Method, Problem
from prompt_tune.methods import METHODS

NAMES = ("basophil", "red blood cell", "monocyte", "normal")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def normal(*shape: int, seed: int = 3) -> Tensor:
    """Normal values in float64."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def batch(backbone: Backbone, count: int = 6) -> Batch:
    """Random image features, labels in turn."""
    return Batch(torch.arange(count) % len(NAMES), features=normal(count, backbone.embed_dim))


def texts(backbone: Backbone, counts: Sequence[int], seed: int = 4) -> ClassTexts:
    """Random embeddings that lie near the class's name."""
    near = backbone.text.encode_texts(NAMES)
    made = tuple(
        near[k] + normal(n, near.shape[1], seed=seed + k) * near[k].std()
        for k, n in enumerate(counts)
    )
    return ClassTexts(((),) * len(made), made)


def problem(backbone: Backbone, **fields: Any) -> Problem:
    """A problem of four classes."""
    return Problem(backbone, NAMES, **fields)


def build(name: str, problem: Problem, **settings: Any) -> Any:
    """A method in float64, moved off its first values."""
    kind: Any = METHODS[name]
    torch.manual_seed(1)
    method = kind(kind.Config(name=name, **settings), problem).double().eval()
    with torch.no_grad():
        for k, parameter in enumerate(method.trainable().values()):
            parameter += 0.4 * parameter.abs().mean() * normal(*parameter.shape, seed=k)
    return method


def sentence_features(backbone: Backbone, sentences: Sequence[str], context: Tensor) -> Tensor:
    """Un-normalised features of sentences whose first tokens have the embeddings `context`."""
    model: Any = backbone.model
    clip = hasattr(model, "token_embedding")
    table = model.token_embedding if clip else model.text.transformer.get_input_embeddings()

    def exchange(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        rest = out[:, 1 + context.shape[-2] :]
        return torch.cat([out[:, :1], context.expand(len(out), -1, -1), rest], dim=1)

    hook = table.register_forward_hook(exchange)
    try:
        found: Tensor = model.encode_text(backbone.tokenizer(list(sentences)))
    finally:
        hook.remove()
    return found


def template_features(backbone: Backbone, template: str = "a photo of a {}.") -> Tensor:
    """Normalised features of one caption per class, by open_clip."""
    model: Any = backbone.model
    with torch.no_grad():
        ids = backbone.tokenizer([template.format(name) for name in NAMES])
        return F.normalize(model.encode_text(ids), dim=-1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """`1/(B C) sum_b KL(softmax(teacher_b) || softmax(student_b))`, term by term."""
    p, q = teacher.softmax(1), student.softmax(1)
    return (p * (p / q).log()).sum() / p.numel()


def assert_same(method: Method, cases: Batch, expected: Tensor) -> None:
    """The method's loss, and its gradient in every parameter, are those of `expected`."""
    names, parameters = zip(*method.trainable().items(), strict=True)
    wanted = torch.autograd.grad(expected, parameters)
    method.zero_grad()
    found = method.backward(cases)
    torch.testing.assert_close(found, expected.detach(), **EXACT)
    for name, parameter, gradient in zip(names, parameters, wanted, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10)
