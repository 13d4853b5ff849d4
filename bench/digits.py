"""Run the README's main job over five folds.

    python bench/digits.py

prints, for each fold, the share of parameters left and the accuracy of the dense network, right after the
decomposition and after fine-tuning, and writes them to bench/results/digits.csv.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import argparse
from pathlib import Path

import pandas as pd

from fasterai_lr.cost import count_params, measure_latency
from fasterai_lr.digits import train_digits

def fold(k, seed):
    "Run one fold and return its row"
    r = train_digits(fold=k, seed=seed)
    dense,small = r.dense.model,r.small.model
    x = r.small.dls.valid.one_batch()[0]
    times = measure_latency(dict(dense=dense, small=small), x)
    return dict(fold=k, seed=seed, params_dense=count_params(dense), params_small=count_params(small),
                dense=r.dense_accuracy, after_swap=r.swap_accuracy, fine_tuned=r.accuracy,
                speed=times['dense'].ms/times['small'].ms)

def print_means(table):
    fewer = (table.params_dense/table.params_small).mean()
    change = 100*(table.fine_tuned - table.dense)
    print(f"mean over {len(table)} folds: {fewer:.2f}x fewer parameters, "
          f"accuracy dense {table.dense.mean():.2%}, right after {table.after_swap.mean():.2%}, "
          f"fine-tuned {table.fine_tuned.mean():.2%}: "
          f"{change.mean():+.2f} points (standard error {change.sem():.2f})")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'digits.csv')
    args = parser.parse_args()
    table = pd.DataFrame([fold(k, args.seed) for k in range(5)])
    args.out.parent.mkdir(exist_ok=True)
    table.to_csv(args.out, index=False)
    print(table.assign(drop=table.dense - table.fine_tuned).to_string(index=False))
    print_means(table)

if __name__ == '__main__': main()
