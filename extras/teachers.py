"""
Teachers: earlier runs whose towers the towers of a new run imitate (train.py --teachers runs/1,runs/2).

Runs that differ by nothing but their seed make different mistakes, so the mean of the similarities that they find is
better than those of each. The new run learns it: distillation of an ensemble (Hinton et al. 2015), for the contrast.
"""

import zlib

import torch

import data
import eval as evaluation
from extras import weights
from extras.runtime import UserError
from mvlt import capped_scale


class Teachers:
    """
    The towers of the runs at `paths`, which read `split`, the training split of `folder`, once and without
    augmentation. Called with G rows, it gives (G, G), picture x caption: the mean of the runs' scaled similarities.
    `digest` changes with the runs.
    """

    def __init__(self, paths, folder, split, device="cpu", skip_bad=False, decode="auto"):
        images, texts, self.digest = [], [], 0
        for path in paths:
            model, tokenizer, run = weights.load_run(path, device)
            if "itc" not in weights.learnt(model):
                raise UserError(f"--teachers: {path} was not trained for itc, so it has no towers to imitate")
            sizes = (model.config.image_size, model.config.text_len, run.get("fit", "stretch"))
            its_split = data.open_split(folder, "train", tokenizer, model.labels, *sizes, skip_bad, decode)
            if its_split.digest != split.digest:
                raise UserError(f"--teachers: {path} reads other rows of {folder} than this run")
            towers = evaluation.read_towers(model, its_split, what=f"teacher {path}")
            images.append(capped_scale(model.log_scale.detach().cpu()) / len(paths) * towers.images)
            texts.append(towers.texts)
            for weight in model.state_dict().values():
                self.digest = zlib.crc32(weight.cpu().numpy().tobytes(), self.digest)
        # the mean of the runs' scaled similarities is one product of their vectors, end to end
        self.images, self.texts = torch.cat(images, dim=1), torch.cat(texts, dim=1)
        self.picture_of, self.caption_of = towers.picture_of, towers.caption_of  # the rows are the same for all

    def __call__(self, rows):
        return self.images[self.picture_of[rows]] @ self.texts[self.caption_of[rows]].T
