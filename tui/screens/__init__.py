"""The screens; each lays widgets out and hands a snapshot on to them."""
