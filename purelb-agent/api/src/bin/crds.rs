//! Writes the CustomResourceDefinitions to a folder, or with `--check` says which of them differ there.

use std::path::Path;
use std::process::ExitCode;

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("name the folder: crds FOLDER [--check]")?;
    let check = args.next().as_deref() == Some("--check");
    let mut differ = Vec::new();
    for (name, text) in purelb_api::crds::files()? {
        let path = Path::new(&folder).join(&name);
        if std::fs::read_to_string(&path).ok().as_deref() == Some(text.as_str()) {
            continue;
        }
        if check {
            differ.push(name);
        } else {
            std::fs::create_dir_all(&folder)?;
            std::fs::write(&path, text)?;
            println!("wrote {}", path.display());
        }
    }
    if differ.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{} differ from the types in purelb-agent/api: run `cargo xtask codegen`", differ.join(", "));
    Ok(ExitCode::FAILURE)
}
