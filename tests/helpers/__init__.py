"""What tests share among themselves and with the programs in tools/: nothing in here is a test."""
