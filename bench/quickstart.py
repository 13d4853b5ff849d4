"""Run the quickstart over five seeds: accuracy dense, decomposed and fine-tuned.

    python bench/quickstart.py

prints the table and writes it to bench/results/quickstart.csv, in half a minute on one core."""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

from pathlib import Path

import pandas as pd
import torch
from fastai.vision.all import Learner, accuracy, nn, set_seed

from fasterai_lr.all import ConvDecomposer, FC_Decomposer
from fasterai_lr.digits import digits_dls

def new_model():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))

def run(seed):
    "Take the steps of the quickstart with one seed, and return its row"
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(), new_model(), metrics=accuracy)
    row = dict(seed=seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(5, 3e-3)
        row['dense'] = learn.validate()[1]
        learn.decompose([FC_Decomposer({'5': 16}), ConvDecomposer('tucker', rank={'2': 0.125})])
        row['decomposed'] = learn.validate()[1]
        learn.fit_one_cycle(3, 1e-3)
        row['fine-tuned'] = learn.validate()[1]
    return row

def main():
    torch.set_num_threads(1)
    table = pd.DataFrame([run(seed) for seed in range(5)]).set_index('seed').round(4)
    table.to_csv(Path(__file__).parent/'results'/'quickstart.csv')
    print(table.to_string())
    print(table.mean().to_frame('mean').T.round(4).to_string())

if __name__ == '__main__': main()
