"""The commands of `t5fx`: a module each, found by discovery."""
