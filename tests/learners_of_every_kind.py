"A small learner of each kind that fastai's users make, and what fastai itself cannot do with it"
from dataclasses import dataclass, field

import numpy as np, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, IterableDataset, TensorDataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from fastai.callback.core import Callback
from fastai.collab import collab_learner
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import RandomSplitter, get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Dice, accuracy, accuracy_multi, mae, rmse
from fastai.tabular.all import tabular_learner
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, text_classifier_learner
from fastai.vision.all import ImageBlock, ResBlock, Resize, XResNet, unet_learner, vision_learner
from learners import dataloaders, datasets
from networks import digits
from small_data import digit_dls, digit_files, mask_dls, rating_dls, text_dls, wine_dls
from small_data import kw as on_cpu

def first_item(learn): return learn.dls.valid_ds.items[0]
def first_row(learn): return learn.dls.valid_ds.items.iloc[0]
def first_index(learn): return learn.dls.valid_ds.splits[0][0]
def first_input(learn): return next(iter(learn.dls.valid.dataset))[0]

@dataclass(frozen=True)
class Kind:
    "A kind of learner"
    make:object # function from a folder to a learner
    item:object = first_item # function from the learner to an item, as `predict` takes it
    params:float = .3 # the budget: the fraction of the parameters that may stay
    kwargs:dict = field(default_factory=dict) # what a decomposition has to be told
    cannot:dict = field(default_factory=dict) # {what fastai cannot do with the dense learner: what its error says}

# Vision

def small_xresnet(pretrained=False): return XResNet(ResBlock, 1, [1,1], stem_szs=(8,8,64), widen=.25)

def classes(path): return vision_learner(digit_dls(path, 32, 8), small_xresnet, pretrained=False, metrics=accuracy)

def is_even_is_large(file): return [label for label,has in (('even', int(file.parent.name)%2 == 0), ('large', int(file.parent.name) > 1)) if has]

def brightness(file): return int(file.parent.name)/3

def block_dls(path, block, get_y):
    "Digits with other targets than their classes"
    block = DataBlock((ImageBlock, block), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.25, seed=0), item_tfms=Resize(32))
    return block.dataloaders(digit_files(path/'digits'), bs=8, **on_cpu)

def labels(path):
    dls = block_dls(path, MultiCategoryBlock, is_even_is_large)
    return vision_learner(dls, small_xresnet, pretrained=False, metrics=accuracy_multi)

def numbers(path):
    dls = block_dls(path, RegressionBlock, brightness)
    return vision_learner(dls, small_xresnet, pretrained=False, n_out=1, y_range=(-.5,1.5), metrics=rmse)

def masks(path): return unet_learner(mask_dls(path), small_xresnet, pretrained=False, metrics=Dice())

# Object detection

def squares(n, seed):
    "`n` images of different widths with one or two squares on noise, and where these are"
    g = np.random.default_rng(seed)
    items = []
    for _ in range(n):
        image = g.random((3, 32, g.integers(32, 40)), 'float32')/2
        boxes,kinds = [],g.integers(1, 3, g.integers(1, 3))
        for kind in kinds:
            a,b = g.integers(0, 20, 2)
            image[kind-1,a:a+11,b:b+11] += .5
            boxes.append([b, a, b+11, a+11])
        items.append((torch.tensor(image), dict(boxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.tensor(kinds))))
    return items

def as_lists(items):
    "A batch of images of different sizes, and their targets"
    images,targets = zip(*items)
    return list(images),list(targets)

def faster_rcnn():
    "torchvision's Faster R-CNN with few layers, which sees 100 regions and returns five boxes"
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1), nn.ReLU())
    backbone.out_channels = 24
    return FasterRCNN(backbone, min_size=32, max_size=48, rpn_anchor_generator=AnchorGenerator(((8,12),), ((1.,),)),
                      box_roi_pool=MultiScaleRoIAlign(['0'], 4, 2), box_head=TwoMLPHead(24*16, 48), box_predictor=FastRCNNPredictor(48, 3),
                      rpn_pre_nms_top_n_train=100, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20,
                      box_score_thresh=-1., box_detections_per_img=5)

class GivesTargets(Callback):
    "Gives torchvision's detector the targets with the images, as it wants them in training"
    def before_batch(self):
        if self.training: self.learn.xb = (*self.xb, *self.yb)

def overlap(found, targets):
    "The mean over the squares of how well the best box of the right kind overlaps, times its score"
    values = []
    for o,target in zip(found, targets):
        right = box_iou(target['boxes'], o['boxes'])*o['scores']*(target['labels'][:,None] == o['labels'])
        values.append(F.pad(right, (1,0)).max(1).values.mean()) # zero where nothing was found
    return torch.stack(values).mean()

def detection_loss(out, targets, reduction='mean'):
    "In training the sum of torchvision's losses, in validation what lacks of the whole overlap"
    return sum(out.values()) if isinstance(out, dict) else 1-overlap(out, targets)

def scores_and_boxes(found):
    "A scalar of what the detector finds, for `loss=`"
    return sum(o['scores'].sum() + .01*o['boxes'].sum() for o in found)

def detector(path):
    loaders = [TorchLoader(squares(n, n), 4, collate_fn=as_lists) for n in (48, 12)]
    return Learner(DataLoaders(*loaders), faster_rcnn(), loss_func=detection_loss, metrics=overlap, cbs=GivesTargets())

# Tables and texts

def table(path): return tabular_learner(wine_dls(), layers=[64,32], metrics=accuracy)

def ratings(path): return collab_learner(rating_dls(), use_nn=True, layers=[64,32], y_range=(0,6))

def texts(path):
    config = dict(awd_lstm_clas_config, emb_sz=32, n_hid=24, n_layers=2)
    return text_classifier_learner(text_dls(), AWD_LSTM, pretrained=False, config=config, seq_len=8, drop_mult=.1, metrics=accuracy)

class Logits(Callback):
    "Takes the scores out of what a Hugging Face model returns"
    def after_pred(self): self.learn.pred = self.pred.logits

def bert(path):
    "A Hugging Face BERT that tells of which half of the vocabulary the first word is, in sequences of different lengths"
    from transformers import BertConfig, BertForSequenceClassification # not there in most environments
    g = torch.Generator().manual_seed(0)
    ids,length = torch.randint(1, 40, (96,10), generator=g),torch.randint(4, 11, (96,), generator=g)
    mask = (torch.arange(10) < length[:,None]).long()
    y = ids[:,0] > 20
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=16)
    dls = dataloaders((ids*mask, mask, y.long()), range(64), range(64, 96), bs=16, n_inp=2)
    return Learner(dls, BertForSequenceClassification(config), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=Logits())

# Batches of other shapes

X,Y = digits(200)
train,valid = range(140),range(140, 200)

def mlp(n_in=64, n_out=10): return nn.Sequential(nn.Linear(n_in, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, n_out))

def classifier(dls, net): return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

class Halves(nn.Module):
    "Classifies a digit by its upper and its lower half"
    def __init__(self):
        super().__init__()
        self.upper,self.lower,self.head = mlp(32, 16),mlp(32, 16),mlp(32)
    def forward(self, upper, lower): return self.head(torch.cat([self.upper(upper.flatten(1)), self.lower(lower.flatten(1))], 1))

def two_inputs(path): return classifier(dataloaders((X[:,:,:4], X[:,:,4:], Y), train, valid, bs=20, n_inp=2), Halves())

class ClassAndMean(nn.Module):
    "Returns the scores of the classes, and how bright the image is"
    def __init__(self):
        super().__init__()
        self.body,self.scores,self.mean = nn.Sequential(nn.Flatten(), mlp(64, 32)),nn.Linear(32, 10),nn.Linear(32, 1)
    def forward(self, x):
        h = self.body(x).relu()
        return self.scores(h),self.mean(h)

def both_losses(out, y, mean, reduction='mean'): return F.cross_entropy(out[0], y, reduction=reduction) + F.mse_loss(out[1].squeeze(1), mean, reduction=reduction)
def mean_error(out, y, mean): return mae(out[1].squeeze(1), mean)

def two_outputs(path):
    dls = dataloaders((X, Y, X.mean((1,2,3))), train, valid, bs=20, n_inp=1)
    return Learner(dls, ClassAndMean(), loss_func=both_losses, metrics=[mean_error])

class OfADict(nn.Module):
    "Classifies a digit in a dict of the image and its mean"
    def __init__(self):
        super().__init__()
        self.net = mlp(65)
    def forward(self, batch): return self.net(torch.cat([batch['image'].flatten(1), batch['mean'][:,None]], 1))

def dicts(path):
    items = [(dict(image=x, mean=x.mean()), y) for x,y in zip(X, Y)]
    return classifier(DataLoaders(*(TorchLoader([items[i] for i in part], 20) for part in (train, valid))), OfADict())

class Stream(IterableDataset):
    "Digits one after the other, which nobody can ask for by number"
    def __init__(self, part): self.part = part
    def __len__(self): return len(self.part)
    def __iter__(self): return ((X[i], Y[i]) for i in self.part)

def flat_mlp(): return nn.Sequential(nn.Flatten(), mlp())

def stream(path): return classifier(DataLoaders(*(DataLoader(Stream(part), bs=20) for part in (train, valid))), flat_mlp())

def torch_stream(path): return classifier(DataLoaders(*(TorchLoader(Stream(part), 20) for part in (train, valid))), flat_mlp())

def weighted(path):
    "Digits of which the larger ones are drawn more often"
    dls = datasets((X, Y), train, valid).weighted_dataloaders(1.+Y[:140].numpy(), bs=20, **on_cpu)
    return classifier(dls, flat_mlp())

def plain(path):
    loaders = [TorchLoader(TensorDataset(X[part], Y[part]), 20, shuffle=part is train) for part in (train, valid)]
    return classifier(DataLoaders(*loaders), flat_mlp())

# what fastai says where it cannot do something with the dense learner either

torch_loader = dict.fromkeys(('predict', 'tta', 'interpretation', 'export'), "'DataLoader' object has no attribute 'new'") # it makes other loaders out of the learner's
no_numbers = 'Could not infer dtype of NoneType' # `get_preds` puts items in the order of their numbers, and those of a stream have none
of_a_stream = dict(predict=no_numbers, interpretation=no_numbers, tta='set_split_idx', export='new_empty')
of_a_table = dict(tta='set_split_idx') # there is no augmentation of tables
of_ratings = of_a_table|dict(predict='list indices must be integers') # `collab_learner` makes a learner whose `predict` is not that of tables
of_two_outputs = dict(tta='tuple indices must be integers') # it stacks what should be one tensor

kinds = dict(
    classification=Kind(classes), multilabel=Kind(labels), segmentation=Kind(masks), regression=Kind(numbers),
    detection=Kind(detector, first_input, kwargs=dict(loss=scores_and_boxes), cannot=torch_loader),
    tabular=Kind(table, first_row, cannot=of_a_table), collab=Kind(ratings, first_row, cannot=of_ratings), text=Kind(texts, first_row, .8), bert=Kind(bert, first_index),
    two_inputs=Kind(two_inputs, first_index), two_outputs=Kind(two_outputs, first_index, cannot=of_two_outputs), dict_batches=Kind(dicts, first_input, cannot=torch_loader),
    fastai_stream=Kind(stream, first_input, cannot=of_a_stream), torch_stream=Kind(torch_stream, first_input, cannot=torch_loader),
    weighted=Kind(weighted, first_index), plain_loaders=Kind(plain, first_input, cannot=torch_loader))
