"""The same training steps in PyTorch float32: channels_last, SGD with momentum."""

import itertools
import os

import torch
from torch import nn
from torch.nn import functional

from harness.networks import MOBILENET_STAGES, NETWORKS, batches
from harness.worker import Calls, UnavailableError


class _Residual(nn.Module):
    def __init__(self, cin, channels, stride):
        super().__init__()
        self.main = nn.Sequential(
            *_conv_norm(cin, channels, 3, stride), nn.ReLU(True), *_conv_norm(channels, channels, 3, 1)
        )
        same = cin == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_norm(cin, channels, 1, stride))

    def forward(self, x):
        return functional.relu(self.main(x) + self.shortcut(x))


class _Inverted(nn.Module):
    def __init__(self, cin, expansion, channels, stride):
        super().__init__()
        wide = cin * expansion
        widen = [*_conv_norm(cin, wide, 1, 1), nn.ReLU6(True)] if expansion > 1 else []
        depthwise = [*_conv_norm(wide, wide, 3, stride, wide), nn.ReLU6(True)]
        self.main = nn.Sequential(*widen, *depthwise, *_conv_norm(wide, channels, 1, 1))
        self.is_residual = cin == channels and stride == 1

    def forward(self, x):
        return x + self.main(x) if self.is_residual else self.main(x)


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class _Lstm(nn.Module):
    def __init__(self, features, width, outputs):
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, width, batch_first=True), nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def _conv_norm(cin, channels, window, stride, groups=1):
    conv = nn.Conv2d(cin, channels, window, stride, window // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(channels)


def _resnet18(example, width=64, outputs=10):
    layers, cin = [*_conv_norm(3, width, 3, 1), nn.ReLU(True)], width
    for stage, block in itertools.product(range(4), range(2)):
        channels = width << stage
        layers.append(_Residual(cin, channels, 2 if stage > 0 and block == 0 else 1))
        cin = channels
    return nn.Sequential(*layers, _Mean(), nn.Linear(cin, outputs))


def _alexnet(example, hidden=4096, outputs=1000):
    convolutions = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1))
    convolutions += ((256, 256, 3, 1, 1),)
    layers = []
    for i, shape in enumerate(convolutions):
        layers += [nn.Conv2d(*shape), nn.ReLU(True)]
        layers += [nn.MaxPool2d(3, 2)] if i in (0, 1, 4) else []
    features = nn.Sequential(*layers, nn.Flatten())
    size = features(torch.zeros(1, example[2], *example[:2])).shape[1]
    head = [nn.Linear(size, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True)]
    return nn.Sequential(features, *head, nn.Linear(hidden, outputs))


def _mobilenet_v2(example, stages=MOBILENET_STAGES, head=1280, outputs=1000):
    layers, cin = [*_conv_norm(3, 32, 3, 2), nn.ReLU6(True)], 32
    for expansion, channels, blocks, stride in stages:
        for block in range(blocks):
            layers.append(_Inverted(cin, expansion, channels, stride if block == 0 else 1))
            cin = channels
    layers += [*_conv_norm(cin, head, 1, 1), nn.ReLU6(True), _Mean(), nn.Linear(head, outputs)]
    return nn.Sequential(*layers)


def _transformer(example, vocabulary=1000, width=512, heads=8, blocks=2):
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(vocabulary, width), encoder, nn.Linear(width, vocabulary))


def _mlp(example, width=2048, outputs=1000):
    sizes = (example[0], width, width, width)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU(True))]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


_MAKE = {
    "resnet18": _resnet18,
    "alexnet": _alexnet,
    "mobilenet_v2": _mobilenet_v2,
    "transformer": _transformer,
    "lstm": lambda example, width=512, outputs=10: _Lstm(example[1], width, outputs),
    "mlp": _mlp,
}


def build(case: dict, name: str) -> tuple[Calls, dict]:
    """The float32 step; its parameters are as many as the Flax network's."""
    if case.get("memory_only"):
        raise UnavailableError("PyTorch does not say what memory a step takes")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    network = NETWORKS[case["network"]]
    example = network.quick_example if case["quick"] else network.example
    model = _MAKE[case["network"]](example, **(network.quick if case["quick"] else {}))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    data = itertools.cycle([(_tensor(x), torch.from_numpy(y).long()) for x, y in batches(case)])

    def step():
        x, y = next(data)
        optimizer.zero_grad()
        logits = model(x)
        loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
        loss.backward()
        optimizer.step()

    step()
    return {"step": step}, {"parameters": sum(p.numel() for p in model.parameters())}


def _tensor(x) -> torch.Tensor:
    tensor = torch.from_numpy(x)
    if tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2)  # NHWC in memory is channels_last
    return tensor.long() if tensor.dtype == torch.int32 else tensor
