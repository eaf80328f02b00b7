"""Looking at a memory: the monitor, the analysis, figures and the HTML report. Nothing here changes a bank."""
