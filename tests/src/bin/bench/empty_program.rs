//! `md_empty`: a TC program of two instructions, the measure of what calling any program costs.

use anyhow::Context as _;
use aya::Ebpf;
use aya::programs::SchedClassifier;
use object::write::{Object, StandardSegment, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

const NAME: &str = "md_empty";

/// `r0 = TC_ACT_UNSPEC; exit`, as linux/bpf.h encodes it.
const CODE: [u8; 16] = [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// The program, in the kernel.
pub struct EmptyProgram {
    ebpf: Ebpf,
}

impl EmptyProgram {
    pub fn load() -> anyhow::Result<Self> {
        let mut ebpf = Ebpf::load(&object_file()?).context("load the empty program")?;
        program(&mut ebpf)?.load().context("load the empty program")?;
        Ok(Self { ebpf })
    }

    pub fn program(&mut self) -> anyhow::Result<&mut SchedClassifier> {
        program(&mut self.ebpf)
    }
}

fn program(ebpf: &mut Ebpf) -> anyhow::Result<&mut SchedClassifier> {
    Ok(ebpf.program_mut(NAME).context("the empty program")?.try_into()?)
}

/// As a compiler would leave it, for a loader that takes nothing else.
fn object_file() -> anyhow::Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let segment = object.segment_name(StandardSegment::Text).to_vec();
    let license = object.add_section(segment.clone(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    let code = object.add_section(segment, b"classifier".to_vec(), SectionKind::Text);
    let symbol = object.add_symbol(Symbol {
        name: NAME.into(),
        value: 0,
        size: 0,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(code),
        flags: SymbolFlags::None,
    });
    object.add_symbol_data(symbol, code, &CODE, 8);
    object.write().context("assemble the empty program")
}
