"""A model's answers for every sample of a data set, each sample once, on one process or shared by several."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from deebert.data.features import Collator, Features, data_loader, eval_batches


def answers(
    ask: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    features: Features,
    collate: Collator,
    batch_size: int,
    device: torch.device,
    accelerator: Accelerator | None = None,
    progress: str | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """What `ask` gives for each batch, float32, behind the samples' indices; all of them, in every process.

    ask: a batch of the collator's tensors, on the device and without labels, -> tensors (B, ...). The batches are the
    same for any number of processes. accelerator: None where this process is alone. progress: the bar's name.
    """
    batches = eval_batches(features.lengths, batch_size)
    processes, process = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    own = iter(data_loader(features, batches[process::processes], collate))
    bar = tqdm(total=len(batches), desc=progress, unit="batch", disable=progress is None or process > 0, leave=False)
    for first in range(0, len(batches), processes):
        found = []
        if first + process < len(batches):
            batch = next(own)
            index, _ = batch.pop("index").numpy(), batch.pop("labels", None)
            with torch.inference_mode():
                given = ask({name: tensor.to(device) for name, tensor in batch.items()})
            found.append((index, *(tensor.float().cpu().numpy() for tensor in given)))
        yield from found if processes == 1 else gather_object(found)
        bar.update(min(processes, len(batches) - first))
    bar.close()
