"""The colours of anomaly maps, also for those who draw no map and need no torch."""

# Eleven RGB colours at equal steps of lightness in Oklab, 0.28 to 0.75, from indigo over violet to pink. So their
# order survives colour blindness and a grey printer, and the top end is a colour that few surfaces have.
COLOR_SCALE = "1c0679 350c8a 4d0f9b 660eac 8011b8 9e1cb6 be1eb3 de15af eb40b7 f55ec0 ff78c8"
