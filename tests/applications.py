"A small learner for each of fastai's applications, and which of its layers can be factored"
import torch
from torch import nn
from fastai.collab import collab_learner
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.tabular.all import tabular_learner
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastai.vision.all import unet_learner, vision_learner
from learners import dataloaders, quiet
from small_data import digit_dls, mask_dls, rating_dls, seed, text_dls, tiny_xresnet, wine_dls
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer

what = [FC_Decomposer(), ConvDecomposer('spatial', rank=.25)] # what `apps` says of the layers that are factored is for this

def vision(arch, **kw):
    "A function that makes a learner of digits with `arch`, for a path"
    return lambda path: vision_learner(digit_dls(path), arch, pretrained=False, metrics=accuracy, **kw)

class Encoder(nn.Module):
    "A transformer that classifies sequences: torch's encoder, or one whose output layer is tied to the embedding"
    def __init__(self, tied):
        super().__init__()
        self.embed,self.encoder = nn.Embedding(20, 32),nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0., batch_first=True), 2)
        self.head = nn.Linear(32, 20)
        if tied: self.head.weight = self.embed.weight
    def forward(self, x): return self.head(self.encoder(self.embed(x)).mean(1))

def transformer(tied=False):
    "A learner that finds the most frequent number of a sequence"
    g = torch.Generator().manual_seed(0)
    x = torch.randint(20, (96,10), generator=g)
    y = x.mode(1).values
    dls = dataloaders((x, y), range(64), range(64, 96), bs=16)
    return Learner(dls, Encoder(tied), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def text(f, config, is_lm, **kw):
    "A function that makes a learner of texts with `f`, fastai's own, for a path"
    config = dict(config, emb_sz=32, n_hid=24, n_layers=2, **kw)
    return lambda path: f(text_dls(is_lm), AWD_LSTM, pretrained=False, config=config, **({} if is_lm else {'seq_len': 8}))

depthwise,hooked = 'a depthwise convolution has nothing to factor','its weight is computed by a hook (weight or spectral norm, weight drop)'
tied,mha = 'its parameters are tied to those of another module','its parent, an nn.MultiheadAttention, reads its weight directly'
# name: how to make the learner, how many layers are factored, {pattern of the names of those that stay dense: reason}
apps = dict(
    xresnet=(vision(tiny_xresnet), 17, {}),
    convnext=(vision('convnext_atto', depths=(1,1,1,1), dims=(8,16,32,64)), 14, {r'0\.model\.stages\.\d\.blocks\.0\.conv_dw': depthwise}),
    vit=(vision('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2), 11, {}),
    unet=(lambda path: unet_learner(mask_dls(path), tiny_xresnet, pretrained=False, self_attention=True), 33, {r'layers\.5\.conv2\.2\.(query|key|value)\.0': hooked}),
    tabular=(lambda path: tabular_learner(wine_dls(), layers=[64,32], metrics=accuracy), 3, {}),
    collab_nn=(lambda path: collab_learner(rating_dls(), use_nn=True, layers=[64,32], y_range=(0,6)), 2, {r'layers\.2\.0': 'rank 1 would not make it smaller: 33 → 34 parameters'}),
    text_classifier=(text(text_classifier_learner, awd_lstm_clas_config, False), 2, {}),
    untied_lm=(text(language_model_learner, awd_lstm_lm_config, True, tie_weights=False), 1, {}),
    transformer=(lambda path: transformer(), 5, {r'encoder\.layers\.\d\.self_attn\.out_proj': mha}),
    tied_transformer=(lambda path: transformer(True), 4, {r'encoder\.layers\.\d\.self_attn\.out_proj': mha, 'head': tied}))
dense_apps = dict(
    collab_dot=(lambda path: collab_learner(rating_dls(), n_factors=8, y_range=(0,6)), {}),
    lm=(text(language_model_learner, awd_lstm_lm_config, True), {r'1\.decoder': tied}))

def made(make, path):
    "The learner that `make` makes in the folder `path`, always the same and without output"
    seed()
    path.mkdir(exist_ok=True)
    return quiet(make(path), path)

def xresnet(path, **kw):
    "A learner of digits with a small XResNet"
    return made(vision(tiny_xresnet, **kw), path)
