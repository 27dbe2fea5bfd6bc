"""
Teachers: earlier runs whose towers the towers of a new run imitate (train.py --teachers runs/1,runs/2).

Runs that differ by nothing but their seed make different mistakes, so the mean of the similarities that they find is
better than those of each. The new run learns it: distillation of an ensemble (Hinton et al. 2015), for the contrast.
"""

import zlib
from pathlib import Path

import data
import eval as evaluation
from extras import weights
from extras.runtime import UserError


class Teachers:
    """
    The towers of the runs at `paths`, which read `split`, the training split of `folder`, once and without
    augmentation. Called with G rows, it gives (G, G), picture x caption: the mean of the runs' scaled similarities.
    `digest` changes with the runs.
    """

    def __init__(self, paths, folder, split, device="cpu", skip_bad=False, decode="auto"):
        self.towers, self.digest = [], 0
        for path in paths:
            model, tokenizer, run = weights.load_run(path, device)
            if "itc" not in model.recipe.weights:
                raise UserError(f"--teachers: {path} was not trained for itc, so it has no towers to imitate")
            sizes = (model.config.image_size, model.config.text_len, run.get("fit", "stretch"))
            its_split = data.open_split(folder, "train", tokenizer, model.labels, *sizes, skip_bad, decode)
            if its_split.digest != split.digest:
                raise UserError(f"--teachers: {path} reads other rows of {folder} than this run")
            towers = evaluation.read_towers(model, its_split, what=f"teacher {path}")
            self.towers.append((min(100.0, model.log_scale.exp().item()), towers))
            file = Path(path) / run["checkpoint"] if Path(path).is_dir() else Path(path)
            self.digest = zlib.crc32(file.read_bytes(), self.digest)

    def __call__(self, rows):
        total = 0
        for scale, towers in self.towers:
            images, texts = towers.images[towers.picture_of[rows]], towers.texts[towers.caption_of[rows]]
            total = total + scale * images @ texts.T
        return total / len(self.towers)
