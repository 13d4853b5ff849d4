"A small network, and small real and generated data for fastai's applications: scikit-learn's digits as files, its wines as a table; generated ratings, texts and masks"
import numpy as np, pandas as pd, random, torch
from PIL import Image
from sklearn.datasets import load_digits, load_wine
from fastai.collab import CollabDataLoaders
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders
from fastai.text.all import BaseTokenizer, ColReader, DataBlock, RandomSplitter, TextBlock
from fastai.vision.all import ImageDataLoaders, ResBlock, Resize, SegmentationDataLoaders, XResNet, get_image_files

torch.set_num_threads(1)
kw = dict(device='cpu', num_workers=0)

def seed():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)

def tiny_xresnet(pretrained=False): return XResNet(ResBlock, 1, [1,1,1,1], stem_szs=(8,8,64), widen=.25)

def digit_files(path, n=96):
    "`n` digits as `path/CLASS/INDEX.png`; of the first four classes"
    images,y = load_digits(n_class=4, return_X_y=True)
    for i in range(n):
        file = path/str(y[i])/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i].reshape(8,8)*15.9).astype('uint8')).convert('RGB').save(file)
    return path

def digit_dls(path, size=32, bs=24, **kwargs):
    return ImageDataLoaders.from_folder(digit_files(path/'digits'), valid_pct=.25, seed=0, item_tfms=Resize(size), bs=bs, **kw, **kwargs)

def mask_file(file): return file.parent.parent/'masks'/f'{file.stem}.png'

def mask_dls(path, n=12, size=32):
    "Images of a bright square, and where it is"
    g = np.random.default_rng(0)
    for o in ('images', 'masks'): (path/o).mkdir()
    for i in range(n):
        mask = np.zeros((size,size), 'uint8')
        a,b = g.integers(2, size-12, 2)
        mask[a:a+10,b:b+10] = 1
        Image.fromarray(np.clip(mask[...,None]*120 + g.integers(0, 99, (size,size,3)), 0, 255).astype('uint8')).save(path/f'images/{i}.png')
        Image.fromarray(mask).save(path/f'masks/{i}.png')
    return SegmentationDataLoaders.from_label_func(path, get_image_files(path/'images'), mask_file, codes=['other', 'square'], valid_pct=.25, seed=0, bs=3, **kw)

def wine_dls():
    wine = load_wine(as_frame=True)
    df = wine.frame.assign(tone=pd.cut(wine.frame.hue, 4, labels=list('abcd')).astype(str))
    valid = list(range(0, len(df), 4))
    return TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['tone'], cont_names=list(wine.feature_names[:10]), y_names='target',
                                      y_block=CategoryBlock(), valid_idx=valid, bs=32, **kw)

def rating_dls(n=200):
    g = np.random.default_rng(0)
    user,item = g.integers(0, 12, n),g.integers(0, 15, n)
    df = pd.DataFrame(dict(user=user, item=item, rating=1. + (user*item + user) % 5))
    return CollabDataLoaders.from_df(df, valid_pct=.2, seed=0, bs=32, **kw)

def text_dls(is_lm=False, n=48):
    "Sentences of made-up words; those of a class prefer their half of the words"
    g = np.random.default_rng(0)
    vocabulary = np.array([c+v+d for c in 'bdgk' for v in 'aeiou' for d in 'ln'])
    label = g.integers(0, 2, n)
    texts = [' '.join(vocabulary[np.minimum(g.integers(0, 30, g.integers(8, 16)) + 10*l, 39)]) for l in label]
    df = pd.DataFrame(dict(text=texts, label=np.array(['one','two'])[label]))
    words = TextBlock.from_df('text', is_lm=is_lm, seq_len=8, tok=BaseTokenizer(), n_workers=0)
    blocks,get_y = ([words], None) if is_lm else ([words, CategoryBlock], ColReader('label'))
    block = DataBlock(blocks, get_x=ColReader('text'), get_y=get_y, splitter=RandomSplitter(.25, seed=0))
    return block.dataloaders(df, bs=8, seq_len=8, **kw)
