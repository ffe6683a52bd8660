# ResNet-18 and -50 with PSPNet (arXiv 1612.01105) on the last stage. timm's ResNets have plain strides: the map has
# 1/32 of the image's side, where mmsegmentation's dilated ones have 1/8.
_base_ = "stitched-swin-ti-s-b_upernet.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(model="resnet18.a1_in1k", pretrained=True),
            dict(model="resnet50.a1_in1k", pretrained=True),
        ],
        img_size=512,
        out_indices=dict(train=(2, 3), test=(3,)),  # the auxiliary head alone reads stage 2
        rank=16,
        flops_step=1e9,
    ),
    decode_head=dict(
        _delete_=True,
        type="PSPHead",
        in_channels=2048,
        in_index=1,
        pool_scales=(1, 2, 3, 6),
        channels=512,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    auxiliary_head=dict(in_channels=1024, in_index=0),
)
