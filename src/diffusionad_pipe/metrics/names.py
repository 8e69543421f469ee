"""What people call the metrics."""

METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "au_pro_0.30": "AU-PRO 0.3",
    "au_pro_0.05": "AU-PRO 0.05",
    "right_decisions": "right decisions",
}
