"""Time series in: data sets from aeon's wheel or a user's folder, prefixes, splits. Arrays only, no torch."""

from gdpd.data.catalog import DatasetInfo, list_datasets
from gdpd.data.labels import canonical_labels, encode_labels, stratified_split
from gdpd.data.load import TimeSeriesData, load_dataset
from gdpd.data.series import fill_missing, pad_series
from gdpd.data.transform import (
    FutureLeakWarning,
    check_earliness,
    is_z_normalised,
    prefix,
    prefix_length,
    resample,
    standardise,
    suffix,
    train_statistics,
    z_normalise,
)

__all__ = [
    "DatasetInfo",
    "FutureLeakWarning",
    "TimeSeriesData",
    "canonical_labels",
    "check_earliness",
    "encode_labels",
    "fill_missing",
    "is_z_normalised",
    "list_datasets",
    "load_dataset",
    "pad_series",
    "prefix",
    "prefix_length",
    "resample",
    "standardise",
    "stratified_split",
    "suffix",
    "train_statistics",
    "z_normalise",
]
