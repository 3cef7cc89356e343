"""The quality report: a corpus's ledgers become numbers, one page, one JSON and a dataset card."""
