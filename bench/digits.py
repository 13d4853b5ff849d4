"Five folds of the README's main job: accuracy dense, right after the decomposition and fine-tuned, with the share of parameters left"
import argparse, warnings
from pathlib import Path

import pandas as pd

from fasterai_lr.cost import count_params, measure_latency
from fasterai_lr.digits import train_digits

def fold(k, seed):
    r = train_digits(fold=k, seed=seed)
    x = r.small.dls.valid.one_batch()[0]
    ms = measure_latency(dict(dense=r.dense.model, small=r.small.model), x)
    return dict(fold=k, seed=seed, params_dense=count_params(r.dense.model), params_small=count_params(r.small.model), dense=r.dense_accuracy,
                after_swap=r.swap_accuracy, fine_tuned=r.accuracy, speed=ms['dense'].ms/ms['small'].ms)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'digits.csv')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)
    table = pd.DataFrame([fold(k, args.seed) for k in range(5)])
    args.out.parent.mkdir(exist_ok=True)
    table.to_csv(args.out, index=False)
    table['drop'] = table.dense - table.fine_tuned
    print(table.to_string(index=False))
    change = -table['drop']
    print(f"mean over five folds: {(table.params_dense/table.params_small).mean():.2f}x fewer parameters, accuracy dense {table.dense.mean():.2%}, right after "
          f"{table.after_swap.mean():.2%}, fine-tuned {table.fine_tuned.mean():.2%}: {100*change.mean():+.2f} points (standard error {100*change.sem():.2f})")
