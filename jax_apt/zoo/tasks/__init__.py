"""Tasks whose data need no download, each with a loss and the field's metric."""

from jax_apt.zoo.tasks.classification import CLUTTER
from jax_apt.zoo.tasks.detection import DETECTION
from jax_apt.zoo.tasks.digits import DIGITS
from jax_apt.zoo.tasks.segmentation import SEGMENTATION
from jax_apt.zoo.tasks.task import Dataset, Recipe, Task
from jax_apt.zoo.tasks.translation import TRANSLATION

__all__ = ["TASKS", "Dataset", "Recipe", "Task"]

TASKS: dict[str, Task] = {t.name: t for t in (DIGITS, CLUTTER, DETECTION, SEGMENTATION, TRANSLATION)}
