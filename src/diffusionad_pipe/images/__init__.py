"""Images from files: finding, opening, checking and drawing them. Without torch but for panels and regions."""
