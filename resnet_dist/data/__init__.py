"""The data path: what there is (sources), what a step shows (sampling), and pixels."""
