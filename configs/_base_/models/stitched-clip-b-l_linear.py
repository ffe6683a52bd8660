# OpenAI's CLIP, B/16 and L/14, with a linear head: the patches of L are resampled to 16 x 16.
_base_ = "stitched-deit3-s-l_linear.py"
model = dict(
    data_preprocessor=dict(mean=[122.7709, 116.746, 104.0937], std=[68.5005, 66.6322, 70.3232]),
    backbone=dict(
        anchors=[
            dict(model="vit_base_patch16_clip_quickgelu_224.openai", pretrained=True, drop_path_rate=0.1),
            dict(
                model="vit_large_patch14_clip_quickgelu_224.openai",
                patch_size=16,
                pretrained=True,
                drop_path_rate=0.1,
            ),
        ],
        rank=4,  # as published for B-L
    ),
)
