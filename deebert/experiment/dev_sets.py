"""Dev sets, tokenized: what a training is watched on, and what an evaluation scores."""

from collections.abc import Iterator
from dataclasses import dataclass

from accelerate import Accelerator

from deebert.data.batching import Collator
from deebert.data.features import Features
from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, run_all_exits


@dataclass(frozen=True)
class DevSets:
    """features: by split, empty in a run that needs none of them."""

    task: Task
    features: dict[str, Features]
    collate: Collator
    accelerator: Accelerator

    def all_exits(self, model, test: bool = True, progress: bool = True) -> Iterator[tuple[str, AllExits]]:
        """For each split the logits of all exits, from one full pass that all processes share.

        test: also of a test file, which is scored at the end only.
        """
        for split, features in self.features.items():
            if split == "test" and not test:
                continue
            yield split, run_all_exits(model, features, self.collate, progress=progress, accelerator=self.accelerator)
