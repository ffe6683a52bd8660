# EVA-02 small and large with a linear head: patches of 14, hence 518 = 37 x 14, and CLIP's normalisation.
_base_ = "stitched-deit3-s-l_linear.py"
model = dict(
    data_preprocessor=dict(mean=[122.7709, 116.746, 104.0937], std=[68.5005, 66.6322, 70.3232], size=(518, 518)),
    backbone=dict(
        anchors=[
            dict(model="eva02_small_patch14_224.mim_in22k", pretrained=True, drop_path_rate=0.1),
            dict(model="eva02_large_patch14_224.mim_in22k", pretrained=True, drop_path_rate=0.1),
        ],
        img_size=518,
    ),
    test_cfg=dict(crop_size=(518, 518), stride=(345, 345)),
)
