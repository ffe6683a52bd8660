# ImageNet-1K with RandAugment and three augmented copies of each image, on ranks side by side, as in DeiT.
_base_ = "imagenet_randaugment.py"
train_dataloader = dict(sampler=dict(_delete_=True, type="mmsnnet.RepeatAugSampler", num_repeats=3))
