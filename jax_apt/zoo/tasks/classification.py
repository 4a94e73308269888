"""Cluttered digits: which digit stands in a coloured scene of 32 x 32 pixels beside a torn stroke."""

from jax_apt.zoo.metrics import top1
from jax_apt.zoo.tasks import scenes
from jax_apt.zoo.tasks.digits import cross_entropy
from jax_apt.zoo.tasks.task import Dataset, Recipe, Task

STYLE = scenes.Style(size=32, digits=1, fragments=1, scale=(1.9, 3.0))


def load(seed: int) -> Dataset:
    return scenes.load(seed, STYLE, copies=16, as_example=lambda s, labels: (s.images, labels))


CLUTTER = Task(
    name="clutter",
    kind="classification",
    metric="top-1",
    networks=("alexnet", "vgg16", "inception-bn", "resnet18", "resnet50", "resnet152", "mobilenet-v2"),
    recipe=Recipe(epochs=16, batch_size=32, learning_rate=5e-3, warmup=0.05),
    load=load,
    outputs=10,
    loss=cross_entropy,
    score=top1,
)
