"""The stages of a data run, each a thin shell around a part of pipeline/."""
